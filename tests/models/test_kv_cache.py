"""Keys and values in slots: every way of decoding gives the logits of the whole text at once."""

import os
from pathlib import Path

import pytest
import torch

from mmllm.models.config import Qwen2Config
from mmllm.models.kv_cache import AllSlots, KVCache, PerSlot
from mmllm.models.qwen import Qwen2
from official import QWEN, randomise_

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model() -> Qwen2:
    model = Qwen2(Qwen2Config.from_dict(QWEN))
    randomise_(model)
    return model.eval()


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


def some_ids(rows: int, length: int) -> torch.Tensor:
    return torch.randint(0, 512, (rows, length), generator=torch.Generator().manual_seed(0))


def whole(model: Qwen2, ids: torch.Tensor) -> torch.Tensor:
    return model.logits(model(model.embed(ids)))


def new_cache(model: Qwen2, slots: int, length: int) -> KVCache:
    return KVCache(model.config, slots, length, device=CPU, dtype=torch.float32)


def read(model: Qwen2, cache: KVCache, slots: list[int], starts: list[int], ids: torch.Tensor) -> torch.Tensor:
    positions = torch.tensor(starts)[:, None] + torch.arange(ids.shape[1])
    return model.logits(model(model.embed(ids), positions, cache=PerSlot(cache, slots, starts)))


def test_text_read_in_pieces_gives_the_logits_of_the_whole(model):
    ids, cache, done, pieces = some_ids(2, 30), new_cache(model, 2, 40), 0, []
    for size in (12, 1, 1, 9, 1, 6):
        pieces.append(read(model, cache, [0, 1], [done, done], ids[:, done : done + size]))
        done += size
    assert (torch.cat(pieces, 1) - whole(model, ids)).abs().max() < 1e-4


def test_slots_continue_at_their_own_positions_in_any_order(model):
    ids, following = some_ids(2, 12), torch.tensor([[7], [9]])
    cache = new_cache(model, 4, 20)
    read(model, cache, [3, 1], [0, 0], ids)  # slot 3 of row 0 now holds seven tokens more than row 0 uses
    got = read(model, cache, [3, 1], [5, 12], following)
    for row, length in enumerate((5, 12)):
        alone = torch.cat([ids[row : row + 1, :length], following[row : row + 1]], 1)
        assert (got[row, 0] - whole(model, alone)[0, -1]).abs().max() < 1e-4


def test_a_step_of_fixed_shape_gives_the_step_of_each_row(model):
    ids = some_ids(3, 12)
    one, other = new_cache(model, 3, 20), new_cache(model, 3, 20)
    for cache in (one, other):
        read(model, cache, [0, 1, 2], [0, 0, 0], ids)
    following, starts = torch.tensor([[7], [9], [11]]), [4, 12, 9]
    wanted = read(model, one, [0, 1, 2], starts, following)
    for length in (13, 20):
        rows = AllSlots(other, torch.tensor(starts), length)
        got = model.logits(model(model.embed(following), torch.tensor(starts)[:, None], cache=rows))
        assert (got - wanted).abs().max() < 1e-4


def test_a_cache_that_grows_keeps_its_contents(model):
    ids, cache = some_ids(1, 13), new_cache(model, 2, 12)
    read(model, cache, [1], [0], ids[:, :12])
    cache.grow_(30)
    assert (read(model, cache, [1], [12], ids[:, 12:])[0, -1] - whole(model, ids)[0, -1]).abs().max() < 1e-4


def test_a_prefix_read_in_one_slot_can_be_used_in_another(model):
    ids, cache = some_ids(1, 20), new_cache(model, 3, 20)
    read(model, cache, [0], [0], ids[:, :13])
    cache.write(2, 0, cache.read(0, 0, 13))
    assert (read(model, cache, [2], [13], ids[:, 13:]) - whole(model, ids)[:, 13:]).abs().max() < 1e-4


def test_slots_can_be_swapped(model):
    cache = new_cache(model, 3, 4)
    cache.keys.copy_(torch.randn(cache.keys.shape))
    before = cache.keys.clone()
    cache.copy_([1, 0], [0, 1], 3)
    assert torch.equal(cache.keys[:, 0, :, :3], before[:, 1, :, :3])
    assert torch.equal(cache.keys[:, 1, :, :3], before[:, 0, :, :3])
    assert torch.equal(cache.keys[:, :, :, 3:], before[:, :, :, 3:]) and torch.equal(cache.keys[:, 2], before[:, 2])


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux")
def test_a_cache_takes_memory_only_where_it_is_written(model):
    def resident_mb() -> float:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20

    before, cache = resident_mb(), new_cache(model, 8, 50_000)
    assert cache.keys.nbytes + cache.values.nbytes > 350 * 2**20
    read(model, cache, [3], [0], some_ids(1, 12))
    assert resident_mb() - before < 70
    assert (
        cache.keys.data_ptr() % 64 == 0
        and cache.keys.count_nonzero() == cache.values.count_nonzero() == 4 * 2 * 12 * 16
    )
