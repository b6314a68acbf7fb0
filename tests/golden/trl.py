"""Golden values of the GRPO objective, made by running TRL itself: trl.safetensors, and trl.json of its settings.

Run, with trl 1.16.0 and two older ones beside it (1.9.0 is the last without the rescaling of DAPO's normaliser):

    pip install trl==1.16.0 torch==2.11.0 safetensors numpy
    pip install --no-deps --target trl190 trl==1.9.0 requests urllib3 idna certifi charset-normalizer
    pip install --no-deps --target trl192 trl==1.9.2 requests urllib3 idna certifi charset-normalizer
    python trl.py --other trl190 trl192

Two runs give equal bytes; trl.json tells the versions. `--cases 96 --out DIR` makes files of the first 96 cases.

Each value but those of `kl/...` comes from TRL's own methods, unchanged: `_generate_and_score_completions` of
GRPOTrainer and RLOOTrainer (advantages, their metrics, the importance sampling ratio, padding, num_items_in_batch),
`split_tensor_dict`, and `_compute_loss` with `get_high_entropy_mask` and `get_off_policy_mask`; the gradients are
torch's. `kl/...` are formulas of this file, which TRL does not have. All is computed in float64 on inputs that are
float32 values, so that TRL's rounding does not enter (its entropy threshold is float32 whatever the input).

The trainers are made by `object.__new__`, and `DEFAULTS` below are their attributes and their `args`. The stubs:
- `_generate`: completions of the lengths that the mask tells, and the sampler's log probabilities where used;
- `_calculate_rewards`: the rewards of the case;
- `_get_per_token_logps_and_entropies`: leaf tensors in the loss, the old or the reference log probabilities before;
- `accelerator`: one process, whose gather, gather_for_metrics, reduce and pad_across_processes are identities;
- `model`: an object with `training` and `is_gradient_checkpointing`; `ref_model`: a name;
- `_tokenizer`: a `pad_token_id`; `processing_class`, of the old versions: a `batch_decode`.
`pad_to_multiple_of` is TRL's own setting: it makes each mask T wide.

Rewards are multiples of 1/32 and weights of 1/8, so their weighted sums are exact in float32 too, and the advantages
of a flat group are 0 exactly (but not those of `gdpo`, which are normalised twice: about 1e-17 of either sign).
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

HERE = Path(__file__).resolve().parent
sys.path[:] = [p for p in sys.path if Path(p).resolve() != HERE]  # `import trl` must not find this file

import numpy as np  # noqa: E402
import torch  # noqa: E402
from safetensors.numpy import save_file  # noqa: E402
from trl.trainer.grpo_trainer import GRPOTrainer  # noqa: E402
from trl.trainer.rloo_trainer import RLOOTrainer  # noqa: E402
from trl.trainer.utils import split_tensor_dict  # noqa: E402

SEED, CASES, P, G, T, K = 20250607, 200, 2, 4, 6, 3
B = P * G

DEFAULTS = {
    "loss_type": "grpo", "importance_sampling_level": "token", "max_completion_length": T, "num_generations": G,
    "scale_rewards": "group", "multi_objective_aggregation": "sum_then_normalize",
    "epsilon_low": 0.2, "epsilon_high": 0.28, "delta": None, "sapo_temperature_pos": 1.0, "sapo_temperature_neg": 1.05,
    "beta": 0.04, "use_bias_correction_kl": False, "off_policy_mask_threshold": None,
    "top_entropy_quantile": 1.0, "entropy_coef": 0.0, "_entropy_bonus_enabled": False, "use_adaptive_entropy": False,
    "use_vllm": False, "vllm_importance_sampling_correction": True, "vllm_importance_sampling_mode": "sequence_mask",
    "vllm_importance_sampling_clip_min": None, "vllm_importance_sampling_clip_max": None,
    "gradient_accumulation_steps": 1, "current_gradient_accumulation_steps": 1, "steps_per_generation": 1,
    "num_iterations": 2,  # so that TRL computes the old log probabilities
    "per_device_train_batch_size": B, "pad_to_multiple_of": T, "mask_truncated_completions": False,
    "aux_loss_enabled": False, "gradient_checkpointing_kwargs": None,
    "normalize_advantages": False, "reward_clip_range": None,  # RLOOTrainer reads these two
}  # fmt: skip
LOSS_TYPES = ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo"]
LEVELS = ["token", "sequence"]
CISPO = {"epsilon_high": 1.3}
SCALES = {scale: {"scale_rewards": scale} for scale in ["group", "batch", "none"]}
SCALES |= {"gdpo": {"multi_objective_aggregation": "normalize_then_sum"}}


def correction(mode, low=0.8):
    """The settings of TRL's correction of the sampler's log probabilities, "vLLM importance sampling"."""
    keys = ["mode", "clip_max", "clip_min"]
    return {"use_vllm": True} | {f"vllm_importance_sampling_{k}": v for k, v in zip(keys, [mode, 1.2, low])}


BONUS = {"entropy_coef": 0.1, "_entropy_bonus_enabled": True}
QUANTILE = {"top_entropy_quantile": 0.4}
OFF_POLICY = {"off_policy_mask_threshold": 0.01}
OPTIONS = {
    "no_kl": {"beta": 0.0},
    "delta": {"delta": 1.5},
    "bias_corrected_kl": {"use_bias_correction_kl": True},
    "entropy_bonus": BONUS,
    "entropy_quantile": QUANTILE,
    "entropy_quantile_and_bonus": QUANTILE | BONUS,
    "off_policy_mask": OFF_POLICY,
    "correction_max_only": correction("sequence_truncate", low=None),
}
MODES = ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]
OPTIONS |= {f"correction_{mode}": correction(mode) for mode in MODES}
EVERYTHING = {"use_bias_correction_kl": True} | QUANTILE | BONUS | OFF_POLICY | correction("token_truncate")
EVERYTHING_ON = [("dapo", "sequence"), ("sapo", "token"), ("cispo", "token")]  # with `delta` on dapo
ALIGNED = {"gradient_accumulation_steps": 2, "current_gradient_accumulation_steps": 2, "steps_per_generation": 2}
MISALIGNED = {"steps_per_generation": 2}


def lengths(case, rng):
    """How many tokens each row has; never none in the whole batch."""
    if case % 20 == 0:
        return np.full(B, T)
    counts = rng.choice(T + 1, B, p=[0.2, 0.2] + 4 * [0.1] + [0.2]) if case % 20 != 2 else rng.integers(0, 2, B)
    group = case // 20 % P
    if case % 20 == 1:
        counts[group * G : (group + 1) * G] = 0
    if counts.sum() == 0:
        counts[(1 - group) * G] = 1
    return counts


def rewards(case, rng):
    """Multiples of 1/32, with constant columns, flat groups and columns that do not apply (NaN)."""
    values = rng.integers(0, 2, (P, G, K)) * 1.0 if case % 4 == 2 else np.round(rng.normal(0, 1, (P, G, K)) * 32) / 32
    constant = rng.random((P, 1, K)) < 0.2
    if case % 7 == 1:
        constant[rng.integers(P)] = True
    if case % 23 == 3:
        constant[:] = True
    values = np.where(constant, values[:, :1], values)
    if case % 5 == 0:
        for group in {0: [0], 1: [1], 2: [0, 1]}[case // 5 % 3]:
            values[group][:, rng.choice(K, rng.integers(1, K), replace=False)] = np.nan
    return values


def one_case(case):
    """Its own generator, so that a case does not depend on how many are made."""
    rng = np.random.default_rng([SEED, case])
    shape = (B, T)
    log_probs = rng.uniform(-4, -0.05, shape)
    old = -np.abs(log_probs + rng.normal(0, 0.3, shape))
    return {
        "log_probs": log_probs,
        "old": old,
        "reference": -np.abs(log_probs + rng.normal(0, 0.5, shape)),
        "sampled": -np.abs(old + rng.normal(0, 0.2, shape)),
        "entropy": rng.uniform(0.05, 3, shape),
        "mask": np.arange(T) < lengths(case, rng)[:, None],
        "rewards": rewards(case, rng),
        "weights": rng.integers(1, 17, K) / 8 * np.where(rng.random(K) < 0.25, -1, 1),
    }


def make_cases(count):
    """The inputs as they are stored, and as float64 tensors, one object a case."""
    made = [one_case(i) for i in range(count)]
    stored = {key: np.stack([case[key] for case in made]).astype(np.float32) for key in made[0]}
    wide = {key: torch.from_numpy(value).double() for key, value in stored.items()}
    return stored, [SimpleNamespace(**{key: value[i] for key, value in wide.items()}) for i in range(count)]


class Stubs:
    """What a trainer asks for of the world: `case`, and in the loss the leaf tensors `log_probs` and `entropy`."""

    def __init__(self, settings, rloo):
        self.rloo = rloo
        self.sampled = settings["use_vllm"] or settings["off_policy_mask_threshold"] is not None

    def generate(self, prompts):
        counts = [int(n) for n in self.case.mask.sum(-1)]
        prompt_ids, completion_ids, texts = [[0]] * B, [[0] * n for n in counts], [""] * B
        if self.rloo:
            return prompt_ids, completion_ids, texts
        sampled = [row[:n].tolist() for row, n in zip(self.case.sampled, counts)] if self.sampled else None
        return prompt_ids, completion_ids, None, texts, sampled, {}, None, None

    def calculate_rewards(self, *_):
        return self.case.rewards.reshape(B, K)

    def log_probs_and_entropies(self, model, *_, compute_entropy=False, **__):
        if compute_entropy:
            return self.log_probs, self.entropy, None
        return (self.case.reference if model == "reference" else self.case.old), None, None


def accelerator():
    same = {name: lambda x, *_, **__: x for name in ["gather", "gather_for_metrics", "reduce", "pad_across_processes"]}
    return SimpleNamespace(device=torch.device("cpu"), process_index=0, num_processes=1, sync_gradients=True, **same)


def make_trainer(settings, kind=GRPOTrainer):
    settings = DEFAULTS | settings
    trainer = object.__new__(kind)
    stubs = Stubs(settings, kind is RLOOTrainer)
    logs = defaultdict(list, rewards=defaultdict(list), extra=defaultdict(list))
    vars(trainer).update(settings, args=SimpleNamespace(**settings), stubs=stubs, accelerator=accelerator())
    vars(trainer).update(
        model=SimpleNamespace(training=True, is_gradient_checkpointing=False),
        ref_model="reference",
        _tokenizer=SimpleNamespace(pad_token_id=0),
        processing_class=SimpleNamespace(batch_decode=lambda ids, **_: [""] * len(ids)),
        reward_func_names=[str(k) for k in range(K)],
        _generate=stubs.generate,
        _calculate_rewards=stubs.calculate_rewards,
        _get_per_token_logps_and_entropies=stubs.log_probs_and_entropies,
    )
    nothing = {"environment_factories": None, "environments": None, "tools": None, "reward_funcs": [None] * K}
    pending = {"_pending_extra_logs": defaultdict(list), "_pending_metrics": defaultdict(list)}
    vars(trainer).update(nothing, **pending, _metrics={"train": defaultdict(list)}, _logs=logs)
    return trainer


def take_metrics(trainer):
    """What TRL has appended since the last call."""
    appended, trainer._metrics["train"] = trainer._metrics["train"], defaultdict(list)
    return {key: values[0] for key, values in appended.items()}


def score(trainer, case):
    """The advantages and all that goes with them, as TRL hands them to its loss, and its metrics."""
    trainer.stubs.case = case
    trainer.reward_weights = case.weights
    batch = trainer._generate_and_score_completions([{"prompt": ""} for _ in range(B)])
    assert batch["advantages"].dtype == torch.float64
    assert torch.equal(batch["completion_mask"].double(), case.mask)
    return batch, take_metrics(trainer)


def loss_of(trainer, batch, rows):
    """TRL's loss of a micro-batch, the rows `rows` of the case, its two gradients and its metrics."""
    stubs = trainer.stubs
    stubs.log_probs = stubs.case.log_probs[rows].clone().requires_grad_()
    stubs.entropy = stubs.case.entropy[rows].clone().requires_grad_()
    loss = trainer._compute_loss(trainer.model, batch)
    gradients = torch.autograd.grad(loss, [stubs.log_probs, stubs.entropy], materialize_grads=True)
    assert loss.dtype == torch.float64 and loss.isfinite()
    for gradient in gradients:
        assert gradient.isfinite().all() and (gradient * (1 - stubs.case.mask[rows]) == 0).all()
    return loss.item(), *(g.numpy() for g in gradients), take_metrics(trainer)


def split(trainer, case, count):
    """The sum over the first `count` of two micro-batches: as TRL accumulates them, but not shuffled."""
    parts = split_tensor_dict(score(trainer, case)[0], 2)[:count]
    got = [loss_of(trainer, part, slice(i * B // 2, (i + 1) * B // 2)) for i, part in enumerate(parts)]
    return sum(g[0] for g in got), np.concatenate([g[1] for g in got])


def store_metrics(tensors, name, all_metrics):
    for key in all_metrics[0]:
        tensors[f"{name}/{key}"] = np.float64([metrics[key] for metrics in all_metrics])


def store_loss(tensors, name, cases, settings, metrics=True):
    trainer = make_trainer(settings)
    got = [loss_of(trainer, score(trainer, case)[0], slice(0, B)) for case in cases]
    losses, gradients, entropy_gradients, all_metrics = zip(*got)
    store_pairs(tensors, name, zip(losses, gradients))
    if settings.get("_entropy_bonus_enabled"):
        tensors[f"{name}/entropy_gradient"] = np.stack(entropy_gradients).astype(np.float32)
    if metrics:
        store_metrics(tensors, f"{name}/metric", all_metrics)


def store_advantages(tensors, cases):
    for scale, settings in SCALES.items():
        trainer = make_trainer(settings)
        batches, metrics = zip(*(score(trainer, case) for case in cases))
        tensors[f"advantage/{scale}"] = np.stack([batch["advantages"].numpy() for batch in batches])
        for key in ["reward", "reward_std", "frac_reward_zero_std"]:
            tensors[f"metric/{scale}/{key}"] = np.float64([m[key] for m in metrics])
        for key in ["mean", "std"]:
            of_each = [[m[f"rewards/{k}/{key}"] for m in metrics] for k in range(K)]
            tensors[f"metric/{scale}/rewards_{key}"] = np.stack(of_each, axis=1)
    trainer = make_trainer({"beta": 0.0}, RLOOTrainer)
    tensors["advantage/rloo"] = np.stack([score(trainer, case)[0]["advantages"].numpy() for case in cases])


def store_losses(tensors, cases):
    for loss_type in LOSS_TYPES:
        for scale, of_scale in SCALES.items():
            for level in LEVELS:
                settings = of_scale | {"loss_type": loss_type, "importance_sampling_level": level}
                settings |= CISPO if loss_type == "cispo" else {}
                store_loss(tensors, f"loss/{loss_type}/{scale}/{level}", cases, settings, metrics=scale == "group")


def store_options(tensors, cases):
    todo = [(o, loss_type, level) for o in OPTIONS for loss_type in ["grpo", "dapo"] for level in LEVELS]
    for option, loss_type, level in todo + [("everything", *on) for on in EVERYTHING_ON]:
        settings = {"loss_type": loss_type, "importance_sampling_level": level} | OPTIONS.get(option, EVERYTHING)
        if option == "everything":
            settings |= {"cispo": CISPO, "dapo": OPTIONS["delta"]}.get(loss_type, {})
        store_loss(tensors, f"option/{option}/{loss_type}/{level}", cases, settings)
    for option in [o for o in OPTIONS if o.startswith("correction")]:
        trainer = make_trainer(OPTIONS[option])
        metrics = [score(trainer, case)[1] for case in cases]
        sampling = [{k: v for k, v in m.items() if k.startswith("sampling/")} for m in metrics]
        store_metrics(tensors, f"metric/{option}", sampling)


def kl_of(case, kind, level):
    """The mean KL over the tokens and its gradient. Not TRL's: TRL has k3 only. `level` None: not bias-corrected."""
    log_probs = case.log_probs.clone().requires_grad_()
    d = case.reference - log_probs
    kl = {"k1": -d, "k2": 0.5 * d**2, "k3": torch.exp(d) - d - 1}[kind]
    log_ratio = log_probs - case.old
    if level == "sequence":
        log_ratio = (log_ratio * case.mask).sum(-1, keepdim=True) / case.mask.sum(-1, keepdim=True).clamp(min=1)
    if level:
        kl = kl * torch.exp(log_ratio)
    loss = (kl * case.mask).sum() / case.mask.sum()
    return loss.item(), torch.autograd.grad(loss, log_probs)[0].numpy()


def store_pairs(tensors, name, pairs):
    losses, gradients = zip(*pairs)
    tensors[f"{name}/loss"] = np.float64(losses)
    tensors[f"{name}/gradient"] = np.stack(gradients).astype(np.float32)


def store_kl(tensors, cases):
    for kind in ["k1", "k2", "k3"]:
        for name, level in [("plain/token", None)] + [(f"bias_corrected/{level}", level) for level in LEVELS]:
            store_pairs(tensors, f"kl/{kind}/{name}", [kl_of(case, kind, level) for case in cases])


def misaligned(cases, loss_type):
    """The first micro-batch of two, each of which is an optimiser step of its own."""
    trainer = make_trainer(MISALIGNED | {"loss_type": loss_type})
    return [split(trainer, case, 1) for case in cases]


def store_split(tensors, cases):
    for loss_type in ["grpo", "dapo", "bnpo"]:
        trainer = make_trainer(ALIGNED | {"loss_type": loss_type})
        store_pairs(tensors, f"split/aligned/{loss_type}", [split(trainer, case, 2) for case in cases])
        store_pairs(tensors, f"split/misaligned/{loss_type}", misaligned(cases, loss_type))


def store_other(tensors, directory, count):
    """`misaligned` of dapo by the TRL in `directory`, in another process; its version."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--cases", str(count), "--out", folder, "--misaligned-only"]
        subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": str(directory)})
        other = (Path(folder) / "version").read_text()
        tensors[f"split/misaligned_{other.replace('.', '_')}/dapo/loss"] = np.load(Path(folder) / "loss.npy")
    return other


def off_policy_counts(cases):
    """Rows of a negative advantage, and how many of them TRL's mask drops."""
    trainer = make_trainer(OFF_POLICY)
    negative, dropped = 0, 0
    for case in cases:
        b = score(trainer, case)[0]
        tensors = b["advantages"][:, None], case.log_probs, b["sampling_per_token_logps"], b["completion_mask"]
        negative += int((b["advantages"] < 0).sum())
        dropped += int((trainer.get_off_policy_mask(*tensors, OFF_POLICY["off_policy_mask_threshold"]) == 0).sum())
    return {"negative_rows": negative, "dropped_rows": dropped}


def description(cases, tensors, others):
    packages = {name: version(name) for name in ["trl", "torch", "numpy", "transformers", "safetensors"]}
    return {
        "versions": packages | {"trl_others": others, "python": platform.python_version()},
        "seed": SEED,
        "sizes": {"cases": len(cases), "groups": P, "samples": G, "rows": B, "tokens": T, "rewards": K},
        "defaults": DEFAULTS,
        "cispo": CISPO,
        "scales": SCALES,
        "options": OPTIONS | {"everything": EVERYTHING, "everything_on": EVERYTHING_ON},
        "split": {"aligned": ALIGNED, "misaligned": MISALIGNED},
        "not_trl": "kl/...",
        "off_policy_mask": off_policy_counts(cases),
        "combinations": sorted(name.removesuffix("/loss") for name in tensors if name.endswith("/loss")),
    }


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", type=int, default=CASES)
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument("--other", type=Path, nargs="*", default=[], help="directories of other versions of TRL")
    parser.add_argument("--misaligned-only", action="store_true", help="for the subprocess that runs another TRL")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    stored, cases = make_cases(arguments.cases)
    if arguments.misaligned_only:
        np.save(arguments.out / "loss.npy", np.float64([loss for loss, _ in misaligned(cases, "dapo")]))
        (arguments.out / "version").write_text(version("trl"))
        return
    tensors = {f"in/{key}": value for key, value in stored.items()}
    for store in [store_advantages, store_losses, store_options, store_kl, store_split]:
        store(tensors, cases)
    others = [store_other(tensors, directory, len(cases)) for directory in arguments.other]
    save_file(tensors, arguments.out / "trl.safetensors")
    text = json.dumps(description(cases, tensors, others), indent=1)
    (arguments.out / "trl.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
