"""
Which balance of A and B trains best after a merge, on the quickstart world.

    python recipes/benchmarks/balance.py

Every start is the same merge, of the three best other adapters. `even`: each singular value's root to either side;
`fresh`: that, scaled so that A has the norm of the fresh A; `rows`: every row of A has the norm of a fresh row;
`average`: the mean balance of the merged adapters; `average x30`: the same with every A times 30 and B divided by it.
"""

import itertools
import math
import statistics
import sys
import tempfile
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
from peft import get_peft_model
from transformers import get_cosine_schedule_with_warmup, set_seed
from trl import SFTTrainer

from mashup_callback import score_candidates
from mashup_callback.factors import Factors, LoraFactors
from mashup_callback.lora.merge import merge_factors
from mashup_callback.lora.trainee import fit, swap
from mashup_callback.lowrank import balanced
from mashup_callback.model.layers import find_trainee


sys.path.insert(0, str(Path(__file__).parents[1] / "quickstart"))
import world


def moved(update: LoraFactors, move: float | torch.Tensor) -> LoraFactors:
    return LoraFactors(update.A * move, update.B / torch.as_tensor(move).flatten(), 1.0)


def like_inputs(update: LoraFactors, inputs: list[LoraFactors]) -> LoraFactors:
    ratio = math.exp(statistics.mean(math.log(one.A.norm() / one.B.norm()) for one in inputs))
    return moved(update, math.sqrt(ratio * update.B.norm() / update.A.norm()))


def even(update: LoraFactors, fresh: torch.Tensor) -> LoraFactors:
    return balanced(update, torch.zeros_like(fresh))


def rows(update: LoraFactors, fresh: torch.Tensor) -> LoraFactors:
    found = even(update, fresh)
    return moved(found, fresh.norm() / math.sqrt(len(fresh)) / found.A.norm(dim=1, keepdim=True))


def average(update: LoraFactors, fresh: torch.Tensor, times: float = 1.0) -> LoraFactors:
    # A merge has scaling 1 and the trainee has 2: the root of the quotient goes to either side.
    return moved(update, times * math.sqrt(1 / 2))


TARGETS, SEEDS, STEPS, RATES = ("smallest", "first", "units"), (1, 2), 24, (2e-4, 6e-3, 1e-2)
BALANCES = {
    "even": even,
    "fresh": balanced,
    "rows": rows,
    "average": average,
    "average x30": partial(average, times=30.0),
}


def batches(target: str, seed: int) -> tuple[list, list]:
    train, test = (world.rows(target, n, s, p) for n, s, p in ((world.TRAIN_ROWS, seed, "train"), (256, 0, "test")))
    with tempfile.TemporaryDirectory() as directory:
        arguments = world.training_arguments(directory, seed, per_device_eval_batch_size=128)
        trainer = SFTTrainer(world.load_model(), arguments, None, train, test, world.load_tokenizer())
        return list(itertools.islice(trainer.get_train_dataloader(), STEPS)), list(trainer.get_eval_dataloader())


def train(merge: Factors | None, balance: str, data: tuple[list, list], seed: int, rate: float) -> tuple[float, float]:
    """Returns the mean training loss and the test loss at the end."""
    set_seed(seed)
    model = get_peft_model(world.load_model(), world.lora_config())
    if merge is not None:
        trainee = find_trainee(model)
        with patch("mashup_callback.lowrank.balanced", BALANCES[balance]):
            swap(model, trainee, fit(merge, trainee))
    optimizer = torch.optim.AdamW([value for value in model.parameters() if value.requires_grad], rate, weight_decay=0)
    schedule = get_cosine_schedule_with_warmup(optimizer, len(data[0]) // 10, len(data[0]))
    losses = []
    for batch in data[0]:
        optimizer.zero_grad()
        (loss := model(**batch).loss).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    with torch.no_grad():
        return statistics.mean(losses), statistics.mean(model(**batch).loss.item() for batch in data[1])


def main() -> None:
    world.quiet()
    runs = []
    for target, seed in itertools.product(TARGETS, SEEDS):
        data = batches(target, seed)
        library = [world.ADAPTERS / task for task in world.TASKS if task != target]
        best = [score.source for score in score_candidates(world.load_model(), library, data[0][:4])[:3]]
        inputs = [source.load().factors for source in best]
        merge = merge_factors(inputs, weights=[1 / 3] * 3, ranks=world.RANK).factors
        merge = {name: like_inputs(update, [one[name] for one in inputs]) for name, update in merge.items()}
        runs.append((merge, data, seed))
    print("| learning rate | start | mean training loss | test loss at the end |\n|---|---|---|---|")
    for rate, balance in itertools.product(RATES, ["scratch", *BALANCES]):
        found = [train(None if balance == "scratch" else merge, balance, *run, rate) for merge, *run in runs]
        mean, end = (statistics.mean(values) for values in zip(*found, strict=True))
        print(f"| {rate:g} | {balance} | {mean:.4f} | {end:.4f} |", flush=True)


if __name__ == "__main__":
    main()
