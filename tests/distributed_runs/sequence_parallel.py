"""Contract: ranks that hold parts of the same sequences together draw the noise of one process, to the bit."""

import itertools

import torch
import torch.distributed as dist
from common import SEED, VOCAB, WIDTH, Lookup, batches, draw_differently, ids, of_one_process, summed, upstream
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.experimental import context_parallel

from neft_kernels import NEFTuneEmbedding, noise_magnitude, noisy_embedding, replace_embeddings

rank, ranks = dist.get_rank(), dist.get_world_size()
mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("cp",))


def sharded(batch):
    """The rank's part of `batch` as torch's own context_parallel() cuts it, and the place of each of its tokens."""
    rows, length = batch["input_ids"].shape
    part = {name: value.clone() for name, value in batch.items()}
    places = torch.arange(length).expand(rows, length).clone()
    buffers = [*part.values(), places]
    with context_parallel(mesh, buffers=buffers, buffer_seq_dims=[1] * len(buffers), no_restore_buffers=set(buffers)):
        pass
    return part, places


def contiguous(batch):
    rows, length = batch["input_ids"].shape
    part = {name: value.chunk(ranks, 1)[rank] for name, value in batch.items()}
    return part, torch.arange(length).expand(rows, length).chunk(ranks, 1)[rank]


def picked(whole, places):
    return whole.gather(1, places[..., None].expand(*places.shape, WIDTH))


def assert_like_one_process(batch, cut, layout, scaled=False, dtype=torch.float32, group=mesh, **options):
    want, want_gradient = of_one_process(Lookup(scaled, dtype), batch, **options)
    part, places = cut(batch)
    model = replace_embeddings(Lookup(scaled, dtype), sequence_group=group, sequence_layout=layout, **options)
    draw_differently()
    got = model(**part)
    got.backward(picked(upstream(want.shape, dtype), places))
    assert torch.equal(got, picked(want, places))
    assert not torch.equal(want, Lookup(scaled, dtype)(**batch))
    assert torch.equal(summed(model.embed.weight.grad), want_gradient)


def parts_of_padded_and_packed_batches():
    for rows, scaled, (cut, layout) in itertools.product(
        (1, 3), (False, True), ((contiguous, "contiguous"), (sharded, "head_tail"))
    ):
        for batch in batches(rows, 6 * ranks).values():
            assert_like_one_process(batch, cut, layout, scaled)


def context_parallel_of_torch_is_head_tail_where_it_can_be():
    even, odd = ids(2, 4 * ranks), ids(2, 3 * ranks)
    _, places = sharded({"input_ids": even})
    assert places[0].tolist() == [2 * rank, 2 * rank + 1, *(4 * ranks - 2 * rank - 2 + step for step in (0, 1))]
    # Where the rows do not divide by twice the ranks, torch cuts them into contiguous parts.
    assert_like_one_process({"input_ids": odd}, sharded, "contiguous")


def rows_scaled_by_batch_and_noise_on_a_part_of_the_tokens():
    batch = batches(2, 4 * ranks)["right padding"]
    batch["attention_mask"] = batch["attention_mask"].bool()
    labels = batch["input_ids"].masked_fill(torch.arange(4 * ranks) % 3 == 0, -100)
    for layout, cut in (("contiguous", contiguous), ("head_tail", sharded)):
        assert_like_one_process(batch, cut, layout, scale_by="batch")
        for noise_on in ("prompt", "completion"):
            assert_like_one_process({**batch, "labels": labels}, cut, layout, noise_on=noise_on)


def every_dtype():
    batch = batches(2, 4 * ranks)["left padding"]
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        assert_like_one_process(batch, sharded, "head_tail", dtype=dtype)


def a_mask_of_the_whole_sequences_does_as_well():
    for batch in batches(2, 4 * ranks).values():
        want, _ = of_one_process(Lookup(), batch)
        part, places = sharded(batch)
        model = replace_embeddings(Lookup(), sequence_group=mesh.get_group(), sequence_layout="head_tail")
        draw_differently()
        assert torch.equal(model(**{**batch, "input_ids": part["input_ids"]}), picked(want, places))


def boundaries_of_the_whole_row():
    """More sequences than one rank has tokens: cumulative lengths are always of the whole row."""
    length = 4 * ranks
    batch = {"input_ids": ids(1, length), "cu_seq_lens_q": torch.arange(0, length + 1, 2)}
    want, _ = of_one_process(Lookup(), batch)
    model = replace_embeddings(Lookup(), sequence_group=mesh)
    draw_differently()
    got = model(batch["input_ids"].chunk(ranks, 1)[rank], cu_seq_lens_q=batch["cu_seq_lens_q"])
    assert torch.equal(got, want.chunk(ranks, 1)[rank])


def an_embedding_of_ones_own():
    """NEFTuneEmbedding takes the group and the masks itself; one that has neither is given its tokens' first number."""
    batch = batches(3, 4 * ranks)["right padding"]
    want, _ = of_one_process(Lookup(), batch)
    part, places = sharded(batch)
    embedding = NEFTuneEmbedding(VOCAB, WIDTH, 0, sequence_group=mesh, sequence_layout="head_tail")
    embedding.load_state_dict(Lookup().embed.state_dict())
    draw_differently()
    assert torch.equal(embedding(part["input_ids"], attention_mask=part["attention_mask"]), picked(want, places))

    row = {"input_ids": batch["input_ids"][:1]}
    want, _ = of_one_process(Lookup(), row)
    torch.manual_seed(SEED)
    got = noisy_embedding(
        row["input_ids"].chunk(ranks, 1)[rank],
        embedding.weight,
        noise_magnitude(row["input_ids"], WIDTH, 5.0),
        first_token=rank * 4,
    )
    assert torch.equal(got, want.chunk(ranks, 1)[rank])


def replicas_of_sequence_parallel_ranks():
    """In a mesh of (data-parallel, context-parallel) each row of ranks is a replica with the stream of its first rank."""
    if ranks < 4:
        return
    replicas = init_device_mesh("cpu", (2, ranks // 2), mesh_dim_names=("dp", "cp"))
    group, first = replicas["cp"], rank - rank % (ranks // 2)
    batch = {"input_ids": ids(2, 8)}
    want, _ = of_one_process(Lookup(), batch, stream=first)
    model = replace_embeddings(Lookup(), sequence_group=group)
    torch.manual_seed(SEED)
    got = model(batch["input_ids"].chunk(group.size(), 1)[group.get_local_rank()])
    assert torch.equal(got, want.chunk(group.size(), 1)[group.get_local_rank()])
    all_of_them = [torch.empty_like(got) for _ in range(ranks)]
    dist.all_gather(all_of_them, got.detach())
    assert not torch.equal(all_of_them[0], all_of_them[ranks // 2])


CHECKS = [
    parts_of_padded_and_packed_batches,
    context_parallel_of_torch_is_head_tail_where_it_can_be,
    rows_scaled_by_batch_and_noise_on_a_part_of_the_tokens,
    every_dtype,
    a_mask_of_the_whole_sequences_does_as_well,
    boundaries_of_the_whole_row,
    an_embedding_of_ones_own,
    replicas_of_sequence_parallel_ranks,
]
