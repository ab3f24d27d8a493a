"""Candidates that share forward passes: the same losses as alone, whoever the others are and whatever the batch is."""

import gc
import queue
import shutil
import time
import weakref

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import DataCollatorForSeq2Seq, T5Config, T5ForConditionalGeneration

from mashup_callback import score_candidates
from mashup_callback.errors import NotTiledError
from mashup_callback.formats.adapter import read_adapter
from mashup_callback.lora.hooks import StackedFactors, Tile
from mashup_callback.scoring import preparing, tiling
from mashup_callback.scoring import race as scoring
from mashup_callback.scoring.sample import Rows
from tests.tiny import llama, rows, save_random_adapter, sft_trainer, tokenizer


VARIANTS = [
    {},
    {"r": 1},
    {"r": 7, "rank_pattern": {"k_proj": 2, "up_proj": 9}},
    {"target_modules": ["q_proj", "v_proj"]},
    {"target_modules": ["down_proj"], "use_rslora": True, "lora_alpha": 3},
    {"r": 3, "target_modules": ["k_proj", "gate_proj"], "alpha_pattern": {"k_proj": 20}},
]


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    directory = tmp_path_factory.mktemp("adapters")
    return [save_random_adapter(directory / str(i), i, scale=1.0, **v) for i, v in enumerate(VARIANTS)]


@pytest.fixture
def passes():
    """Rows of each forward pass of the models that [`watched`] made."""
    return []


def watched(passes, model=None):
    model = (model or llama()).eval()
    model.register_forward_pre_hook(
        lambda module, args, kwargs: passes.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    return model


def batch(rows=3, length=11, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(7, 80, (rows, length), generator=generator)
    mask = torch.ones_like(tokens)
    mask[-1, 8:] = 0
    labels = tokens.masked_fill(torch.rand(rows, length, generator=generator) > 0.5, -100).masked_fill(mask == 0, -100)
    return {"input_ids": tokens, "attention_mask": mask, "labels": labels}


def found(paths, batches, model=None, tokens=None, **options):
    with pytest.MonkeyPatch.context() as patch:
        if tokens is not None:
            patch.setattr(tiling, "CPU_TOKENS", tokens)
        scores = score_candidates(model or llama(), paths, batches, **options)
    return {score.candidate.name: score for score in scores}


def assert_same(scores, others):
    assert scores.keys() == others.keys()
    for name, score in scores.items():
        assert score.status == others[name].status == "scored"
        torch.testing.assert_close(score.losses.loss, others[name].losses.loss, rtol=1e-5, atol=1e-5)
        assert score.loss == pytest.approx(others[name].loss, rel=1e-6)
        assert torch.equal(score.losses.tokens, others[name].losses.tokens)
        assert torch.equal(score.losses.correct, others[name].losses.correct)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    chosen=st.lists(st.integers(0, len(VARIANTS) - 1), min_size=2, max_size=6),
    sizes=st.lists(st.tuples(st.integers(1, 4), st.integers(9, 20)), min_size=1, max_size=3),
    tokens=st.integers(40, 400),
)
def test_losses_do_not_depend_on_who_shares_the_pass(adapters, chosen, sizes, tokens):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiling, "PADDING", 1.0)
        batches = [batch(*size, seed=seed) for seed, size in enumerate(sizes)]
        paths = [read_adapter(adapters[index]) for index in chosen]
        together = found(paths, batches, tokens=tokens)
    assert_same(together, found(paths, batches, tokens=0))


def test_a_pass_is_shared_up_to_its_tokens(adapters, passes):
    paths = [adapters[0]] * 5
    found(paths, [batch(2, 10), batch(4, 10), batch(20, 10)], watched(passes), tokens=80)
    # 4 candidates of 2 rows and the fifth, twice 2 of 4 rows and the fifth, each of 20 rows.
    assert sorted(passes) == sorted([8, 8, 8, 20, 20, 20, 20, 2, 4, 20])


def test_no_more_candidates_share_a_pass_than_bounds_allow(adapters, passes, monkeypatch):
    monkeypatch.setattr(tiling, "CANDIDATES", 3)
    found([adapters[0]] * 7, [batch(1, 11)], watched(passes))
    assert passes == [3, 3, 1]
    passes.clear()
    monkeypatch.setattr(tiling, "FACTOR_BYTES", 0)
    monkeypatch.setattr(tiling, "MODEL_SHARE", 10**9)
    found([adapters[0]] * 3, [batch(1, 11)], watched(passes))
    assert passes == [1, 1, 1]


def test_a_large_rank_is_not_padded_to(tmp_path, adapters, passes):
    large = save_random_adapter(tmp_path / "large", 0, r=64)
    found([*[adapters[1]] * 3, large, large, *[adapters[1]] * 3], [batch(1, 11)], watched(passes))
    # As many of rank 1 as of rank 64 may be padded, since at most half of a stack is zeros.
    assert passes == [3, 4, 1]


def test_half_precision(adapters):
    paths, data = adapters[:4], [batch()]
    together, alone = (found(paths, data, llama().bfloat16(), tokens=tokens) for tokens in (400, 0))
    for name, score in together.items():
        assert score.loss == pytest.approx(alone[name].loss, rel=2**-6)


def test_token_accuracy_and_racing(tmp_path, adapters):
    loader = sft_trainer(tmp_path / "out", train_rows=rows("text", 64)).get_train_dataloader()
    examples = [loader.dataset[i] for i in range(64)]
    for options in ({"metric": "token_accuracy"}, {"search": "racing", "keep": 2}):
        together, again, alone = (
            found(adapters, Rows(examples, loader.collate_fn, 8), tokens=tokens, **options) for tokens in (999, 999, 0)
        )
        if "metric" in options:
            assert_same(together, alone)
        assert {n: (s.status, s.rows) for n, s in together.items()} == {
            n: (s.status, s.rows) for n, s in alone.items()
        }
        assert {n: s.loss for n, s in together.items()} == {n: s.loss for n, s in again.items()}


def test_encoder_and_decoder(tmp_path):
    config = {"vocab_size": 96, "d_model": 32, "d_ff": 64, "d_kv": 8, "num_layers": 2, "num_heads": 4}

    def model():
        torch.manual_seed(0)
        return T5ForConditionalGeneration(T5Config(**config, decoder_start_token_id=0))

    paths = [
        save_random_adapter(tmp_path / str(i), i, base=model(), target_modules=["q", "v", "wo"], task_type=None)
        for i in range(3)
    ]
    data = [{"input_ids": list(range(5, 12 + i)), "labels": list(range(7, 10 + 2 * i))} for i in range(3)]
    batches = [DataCollatorForSeq2Seq(tokenizer())(data)]
    passes = []
    assert_same(found(paths, batches, watched(passes, model())), found(paths, batches, model(), tokens=0))
    assert passes == [9]


PACKED = {
    "input_ids": torch.arange(8, 28)[None],
    "labels": torch.arange(8, 28)[None],
    "position_ids": torch.tensor([[*range(12), *range(8)]]),
}


@pytest.mark.parametrize(
    "data",
    [
        PACKED,
        {**PACKED, "cu_seq_lens_q": torch.tensor([0, 12, 20]), "max_length_q": 12},
        {**batch(), "position_ids": torch.arange(11)[None]},
        {**batch(), "ids": ["a", "b", "c"]},
    ],
    ids=["packed", "packed-lengths", "positions-for-all", "strings"],
)
def test_batches_that_cannot_be_repeated_are_not(data):
    assert tiling.Tiling(llama(), True).width(data) == 1
    assert tiling.Tiling(llama(), True).width(batch()) > 1


def test_packed_rows_next_to_others(adapters, passes):
    batches = [PACKED, batch(), {**batch(2), "position_ids": torch.arange(11).repeat(2, 1)}]
    together = found(adapters[:3], batches, watched(passes))
    assert sorted(passes) == [1, 1, 1, 6, 9]
    assert_same(together, found(adapters[:3], batches, tokens=0))


def test_adapters_of_the_head_are_scored_alone(tmp_path, adapters, passes):
    head = save_random_adapter(tmp_path / "head", 0, target_modules=["q_proj", "lm_head"])
    paths = [adapters[0], head, adapters[0], adapters[1]]
    together = found([read_adapter(path) for path in paths], [batch()], watched(passes))
    assert passes == [3, 3, 6]
    assert_same(together, found(paths, [batch()], tokens=0))


class Experts(nn.Module):
    """Sends one half of all tokens to one layer and the other half to another."""

    def __init__(self, layer):
        super().__init__()
        self.first, self.second = layer, nn.Linear(layer.in_features, layer.out_features, bias=False)

    def forward(self, x):
        halves = x.reshape(-1, x.shape[-1]).chunk(2)
        return torch.cat([self.first(halves[0]), self.second(halves[1])]).view(*x.shape[:-1], -1)


def test_a_model_that_mixes_the_rows_is_noticed(tmp_path, passes, monkeypatch):
    def model():
        torch.manual_seed(0)
        model = llama()
        model.model.layers[0].mlp.up_proj = Experts(model.model.layers[0].mlp.up_proj)
        return model

    monkeypatch.setattr(tiling, "CANDIDATES", 3)
    paths = [
        save_random_adapter(tmp_path / str(i), i, base=model(), scale=1.0, target_modules=["first", "second"])
        for i in range(6)
    ]
    together = found(paths, [batch(4, 12)], watched(passes, model()))
    # The first shared pass fails, and there is no second one.
    assert passes == [12, *[4] * 6]
    assert_same(together, found(paths, [batch(4, 12)], model(), tokens=0))


def test_tile_refuses_what_is_not_the_whole_batch():
    tile = Tile(2, 5, rows=6, tokens=24)
    assert tile.split(torch.zeros(6, 4, 7)).shape == (3, 8, 7)
    assert tile.split(torch.zeros(24, 7)).shape == (3, 8, 7)
    for shape in ((6, 7), (12, 7), (3, 8, 7)):
        with pytest.raises(NotTiledError):
            tile.split(torch.zeros(shape))


def broken(source, directory, change):
    shutil.copytree(source, directory)
    tensors = load_file(source / "adapter_model.safetensors")
    save_file({name: change(name, value) for name, value in tensors.items()}, directory / "adapter_model.safetensors")
    return directory


def test_what_one_candidate_does_wrong_is_its_own_affair(tmp_path, adapters, passes, monkeypatch):
    """One cannot be loaded, one gives NaN: the others have the losses that they have without these."""
    monkeypatch.setattr(tiling, "PADDING", 1.0)
    unreadable = broken(adapters[0], tmp_path / "nan", lambda name, value: value * torch.nan)
    wild = broken(adapters[0], tmp_path / "wild", lambda name, value: torch.full_like(value, 9e3))
    good = [adapters[0], adapters[2], adapters[3]]
    data = [batch()]
    scores = found([good[0], unreadable, good[1], wild, good[2]], data, watched(passes, overflowing()))
    assert passes == [15]
    assert scores[str(unreadable)].status == "rejected" and "nan" in scores[str(unreadable)].reason
    assert scores[str(wild)].status == "failed" and "nan" in scores[str(wild)].reason
    assert_same({str(path): scores[str(path)] for path in good}, found(good, data, overflowing(), tokens=0))


def overflowing():
    """A model in which activations beyond what others have become infinite, and then not a number."""
    model, inf = llama(), torch.tensor(torch.inf)
    model.model.norm.register_forward_pre_hook(lambda layer, args: args[0] * torch.where(args[0].abs() > 1e4, inf, 1))
    return model


def test_a_shared_pass_that_fails_is_no_ones_failure_but_the_culprits(adapters, monkeypatch):
    model, calls = llama(), []

    def fail(module, args, kwargs):
        calls.append(len(kwargs["input_ids"]))
        if calls[-1] > 3 or len(calls) == 3:
            raise RuntimeError("an illegal instruction was encountered")

    model.register_forward_pre_hook(fail, with_kwargs=True)
    scores = found(adapters[:3], [batch()], model)
    assert calls == [9, 3, 3, 3]
    assert [scores[str(path)].status for path in adapters[:3]] == ["scored", "failed", "scored"]
    assert "illegal instruction" in scores[str(adapters[1])].reason


def test_out_of_memory_lets_fewer_share_for_good(adapters):
    model, sizes = llama(), []

    def forward(module, args, kwargs):
        sizes.append(len(kwargs["input_ids"]))
        if sizes[-1] > 6:
            raise RuntimeError("CUDA out of memory.")

    model.register_forward_pre_hook(forward, with_kwargs=True)
    scores = found([adapters[0]] * 5, [batch(), batch()], model)
    assert sizes == [15, 6, 6, 3, 6, 6, 3]
    assert all(score.status == "scored" for score in scores.values())


def test_time_and_callable_metrics(adapters, passes):
    assert {score.status for score in found(adapters, [batch()], max_seconds=0).values()} == {"eliminated"}
    score_candidates(watched(passes), adapters, [batch()], lambda model, data: (model(**data).loss.item(), 1))
    assert passes == [3] * len(adapters)


def test_seconds_are_shared_and_kept_scores_are_found(tmp_path, adapters, passes, monkeypatch):
    monkeypatch.setenv("MASHUP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tiling, "PADDING", 1.0)
    model = watched(passes)
    handle = model.register_forward_pre_hook(lambda *args: time.sleep(0.2))
    first = found(adapters[:2], [batch()], model)
    handle.remove()
    assert all(0.1 <= score.seconds < 0.2 for score in first.values())
    second = found(adapters[:4], [batch()], watched(passes))
    # The two that are new share a pass.
    assert passes == [6, 6]
    assert {name: second[name].loss for name in first} == {name: score.loss for name, score in first.items()}


def test_two_groups_are_in_memory_and_never_three(adapters, monkeypatch):
    """The next group is read while the current one is scored, and what was scored is forgotten."""
    monkeypatch.setattr(tiling, "CANDIDATES", 2)
    alive, most, read = weakref.WeakSet(), [], queue.Queue()
    empty, evaluate = preparing.empty_stack, scoring.evaluate_together

    def counted(candidates):
        stacked = empty(candidates)
        alive.update(factors.A for factors in stacked)
        read.put(len(stacked))
        return stacked

    def evaluated(*args):
        # Its own, and the next one: waits until that is read.
        while evaluated.read < min(len(most) + 2, 6):
            read.get(timeout=5)
            evaluated.read += 1
        gc.collect()
        most.append(sum(tensor.nbytes for tensor in alive))
        return evaluate(*args)

    evaluated.read = 0
    monkeypatch.setattr(preparing, "empty_stack", counted)
    monkeypatch.setattr(scoring, "evaluate_together", evaluated)
    scores = found([adapters[0]] * 12, [batch()])
    assert {score.status for score in scores.values()} == {"scored"}
    one = sum(factors.A.nbytes for factors in empty([read_adapter(adapters[0]).modules] * 2))
    assert most == [2 * one] * 5 + [one]


def test_stack_holds_scaled_factors_and_zeros(adapters):
    from mashup_callback.formats.adapter import load_factors
    from mashup_callback.lora.hooks import empty_stack

    candidates = [load_factors(read_adapter(path)) for path in adapters]
    stacked = empty_stack(candidates)
    for place, factors in enumerate(candidates):
        for part in stacked:
            assert isinstance(part, StackedFactors)
            part.put(place, factors)
    for part in stacked:
        for name, (ranks, B) in part.B.items():
            for place, factors in enumerate(candidates):
                delta = B[place] @ part.A[place, ranks]
                expected = factors[name].delta() if name in factors else torch.zeros_like(delta)
                torch.testing.assert_close(delta, expected)
