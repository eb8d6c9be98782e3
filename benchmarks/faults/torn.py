"""Torn files: what is read from them is refused, or as it was, and never something else."""

import copy
import hashlib
import shutil

import torch

from faults.site import REPORT, kept, told
from faults.tally import Tally
from relfisher import RNGD
from relfisher.studies.cells import Cell
from relfisher.studies.data import DataError, load
from relfisher.studies.runs import Record
from relfisher.studies.store import Store

__all__ = ["garbled", "torn_checkpoints", "torn_data", "torn_results", "torn_runs"]


def garbled(content, generator):
    """Return a torn file: cut off, overwritten, or with a few bits of it changed.

    Args:
        content: the content of the file.
        generator: a `random.Random`.

    Returns:
        Another content.
    """
    kind, place = generator.randrange(4), generator.randrange(len(content))
    if kind == 0:
        return content[:place]
    torn = bytearray(content)
    if kind == 1:
        end = min(len(torn), place + generator.randint(1, 4096))
        torn[place:end] = bytes(end - place)
    elif kind == 2:
        torn[place:] = generator.randbytes(len(torn) - place)
    for _ in range(generator.randint(1, 3)):
        torn[generator.randrange(len(torn))] ^= 1 << generator.randrange(8)
    return bytes(torn)


def torn_results(site, times):
    """Garble a random file of a finished study, a run or a table, and give the command again."""
    tally = Tally("a result file torn at a random place: repeated and named, or as it was")
    for trial in range(times):
        out = site.root / f"torn-{trial}"
        shutil.copytree(site.intact, out)
        path = site.random.choice([*(out / "runs").iterdir()] * 3 + [out / name for name in REPORT])
        path.write_bytes(garbled(path.read_bytes(), site.random))
        status, errors = site.run(out)
        different = site.whole(out)
        survived = status == 0 and not different and (not errors or told(errors, str(path), "unreadable"))
        tally.count(survived, f"{path.name}: status {status}, {errors}, {different}")
        shutil.rmtree(out)
    return tally


class Torn(Cell):
    """A cell whose result is in the file `torn.npz`.

    Args:
        options: its identity.
    """

    name = key = "torn"

    def __init__(self, options):
        self.options = options

    def identity(self):
        """Return the identity."""
        return self.options


def torn_runs(site, times):
    """Garble the file of a run, and read it."""
    tally = Tally("the file of a run torn at a random place and read: refused, or as it was")
    path = next((site.intact / "runs").glob("*.npz"))
    content = path.read_bytes()
    torn = site.root / "torn.npz"
    for _ in range(times):
        torn.write_bytes(garbled(content, site.random))
        store = Store(site.root, Record.of)
        record = store.load(Torn(site.results[path.name][0]))
        same = record is not None and kept(record.arrays()) == site.results[path.name][1:]
        tally.count(same or (record is None and store.damaged == [torn]), "another record is read")
    return tally


def torn_data(site, times):
    """Garble a file of the data set, and load it."""
    tally = Tally("a data file torn at a random place: refused by name, or as it was")
    before = load(str(site.digits)).fingerprint()
    paths = sorted(site.digits.iterdir())
    for _ in range(times):
        path = site.random.choice(paths)
        content = path.read_bytes()
        path.write_bytes(garbled(content, site.random))
        load.cache_clear()
        try:
            tally.count(load(str(site.digits)).fingerprint() == before, f"{path.name}: other images or labels")
        except DataError as error:
            tally.count(path.name in str(error), str(error))
        except Exception as error:  # the fault that is looked for
            tally.count(False, f"{path.name}: {type(error).__name__}: {error}")
        path.write_bytes(content)
    load.cache_clear()
    return tally


def torn_checkpoints(site, times):
    """Garble the saved state of an optimizer and load it with torch, which does not compare checksums."""
    tally = Tally(
        "a saved state torn at a random place: refused, and nothing of it is loaded; or loaded as torch reads it"
    )
    path = site.root / "state.pt"
    model = torch.nn.Sequential(torch.nn.Linear(9, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    optimizer = RNGD(model)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(20, 9)).square().mean().backward()
        optimizer.step()
    intact = optimizer.state_dict()
    torch.save(intact, path)
    content, before = path.read_bytes(), fingerprint(intact)
    for _ in range(times):
        path.write_bytes(garbled(content, site.random))
        try:
            read = torch.load(path, weights_only=True)
        except Exception:
            tally.count(True, "refused by torch")
            continue
        _, twin = copy.deepcopy((model, optimizer))
        try:
            twin.load_state_dict(read)
        except (TypeError, ValueError) as error:
            tally.count(fingerprint(twin.state_dict()) == before, f"partly loaded: {error}")
        except Exception as error:  # the fault that is looked for
            tally.count(False, f"{type(error).__name__}: {error}")
        else:
            tally.count(fingerprint(twin.state_dict()) == fingerprint(read), "another state is loaded")
    return tally


def fingerprint(saved):
    """Return a hash of a saved state; names of parameters are taken from the optimizer if it lacks them."""
    digest = hashlib.sha256()
    for key, state in sorted(saved["state"].items(), key=str):
        for name, value in sorted(state.items()):
            digest.update(f"{key} {name}".encode())
            value = value != 0 if name == "is_head" else value
            digest.update(value.detach().numpy().tobytes() if isinstance(value, torch.Tensor) else str(value).encode())
    for group in saved["param_groups"]:
        digest.update(str({key: value for key, value in group.items() if key != "param_names"}).encode())
    return digest.hexdigest()
