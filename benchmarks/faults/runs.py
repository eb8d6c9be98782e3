"""Faults while a study runs: what the same command then finds must be what it would be without them."""

import os
import shutil

from faults.site import answer, told
from faults.tally import Tally

__all__ = ["closed_outputs", "concurrent", "full_disks", "kills"]


def kills(site, times):
    """Kill the study at random moments, repeatedly, and then let it end."""
    tally = Tally("`kill -9` of a study at a random moment: resumed, its results are those without it")
    for trial in range(times):
        out = site.root / f"killed-{trial}"
        moments = [site.random.uniform(0, site.seconds) for _ in range(site.random.randint(1, 3))]
        for moment in moments:
            process, _ = site.fork(out)
            process.join(moment)
            process.kill()
            process.join()
        different = site.resumed(out) if out.exists() else ""
        tally.count(not different, f"killed after {moments} s: {different}")
        shutil.rmtree(out, ignore_errors=True)
    return tally


def full_disks(site, times):
    """Limit the size of files at random, which fails the first write beyond it, and then give the command again."""
    tally = Tally("full disk at a random file: one line, status 1, nothing torn; resumed, as without it")
    sizes = [path.stat().st_size for path in site.intact.rglob("*") if path.is_file()]
    for trial in range(times):
        out = site.root / f"full-{trial}"
        # Every file alike may be the first that is too large. Sizes differ a little between runs, as times do.
        limit = int(site.random.uniform(0, 0.8) * site.random.choice(sizes))
        status, errors = site.run(out, limit=limit)
        left = [path.name for path in out.rglob(".*.tmp")]
        survived = status == 1 and told(errors, str(out), "cannot be written", "same command") and not left
        different = site.resumed(out)
        what = f"files of {limit} bytes: status {status}, {errors}, left {left}, resumed: {different}"
        tally.count(survived and not different, what)
        shutil.rmtree(out)
    return tally


def closed_outputs(site):
    """Let the standard output fail in every way; the files must be written all the same."""
    tally = Tally("standard output closed or full: one line, status 1, all files written")
    for stream in (full_device, closed_pipe, nothing):
        out = site.root / stream.__name__
        status, errors = site.run(out, stream)
        different = site.whole(out)
        survived = status == 1 and told(errors, "standard output") and not different
        tally.count(survived, f"{stream.__name__}: status {status}, {errors}, {different}")
        shutil.rmtree(out)
    return tally


def full_device():
    """Return a standard output that no byte fits into."""
    return open("/dev/full", "w")


def closed_pipe():
    """Return a standard output that nobody reads."""
    reading, writing = os.pipe()
    os.close(reading)
    return os.fdopen(writing, "w")


def nothing():
    """Return what Python has for a standard output that is closed."""


def concurrent(site, times):
    """Run the study two or three times at once in one directory."""
    tally = Tally("two or three processes in one directory at once: all end, results as of one")
    for trial in range(times):
        out = site.root / f"shared-{trial}"
        together = [site.fork(out) for _ in range(2 + trial % 2)]
        ends = [answer(*each) for each in together]
        different = site.whole(out)
        tally.count(not different and all(end == (0, "") for end in ends), f"{ends}, {different}")
        shutil.rmtree(out)
    return tally
