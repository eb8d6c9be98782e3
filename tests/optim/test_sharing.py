"""Which process owns which layer."""

import pytest
from builders import mlp

from relfisher.layers import discover
from relfisher.optim.exchange import Message
from relfisher.optim.ranks import Ranks
from relfisher.optim.sharing import Load, Sharing, assigned, load_of
from relfisher.structures import SharedBlock


def layers(count):
    return discover(mlp(sizes=(4,) * (count + 1))).layers


def test_the_largest_come_first_each_to_the_process_with_the_least():
    loads = dict(zip(layers(5), (Load(size, size, size) for size in (5, 4, 3, 3, 3)), strict=True))
    owner, carried = assigned(loads, [Load(), Load()])
    assert [load.bytes for load in carried] == [8, 10]
    assert list(owner.values()) == [0, 1, 1, 0, 1]
    new = dict(zip(layers(1), [Load(1, 1, 1)], strict=True))
    owner, carried = assigned(new, carried)
    assert list(owner.values()) == [0]
    assert carried[0] == Load(9, 9, 9)


def test_owners_are_those_of_as_many_processes(monkeypatch):
    model = mlp()
    ranks = Ranks(model)
    ranks.together = True
    monkeypatch.setattr(Ranks, "world", 2)
    sharing, structures = Sharing(ranks, False), {layer: SharedBlock() for layer in discover(model).layers}
    sharing.assign(structures)
    assert set(sharing.owner.values()) == {0, 1}
    first = next(iter(structures))
    sharing.forget(first)
    assert first not in sharing.owner
    monkeypatch.setattr(Ranks, "world", 3)
    with pytest.raises(ValueError, match="2 processes share out between them, which 3 cannot go on with"):
        sharing.assign({})
    assert not Sharing(ranks, True).active
    assert not Sharing(ranks, None).active


def test_messages_are_equally_long_unless_much_would_be_in_vain():
    own = layers(4)
    size = load_of(own[0], SharedBlock(), None).sent
    even = Message(dict(zip(own, (0, 1, 0, 1), strict=True)), 2)
    assert even.is_even
    assert even.sent() == sum(even.sizes) / 2
    uneven = Message(dict(zip(own, (0, 0, 0, 2), strict=True)), 3)
    assert not uneven.is_even
    assert uneven.sizes[1] == 0
    assert 3 * size < uneven.sizes[0] < 3 * size + 32
