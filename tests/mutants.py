"""Breaks the mathematics one line at a time and says which test notices.

Run from a clean checkout: python tests/mutants.py. Each mutant is one replacement; the tests of `grpo` run; the file is put
back. Prints the table of src/docs/proof.md and fails where a mutant survives or its line is no longer there.
"""

import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
# Compiling takes most of the time of a mutant: without optimisation it takes a third.
FAST = ["--config", "profile.dev.package.grpo.opt-level=0"]
TESTS = "--lib --test objective --test trl --test robustness --test trajectory".split()

# (what, file, the line as it is, the line as it must not be)
MUTANTS = [
    ("sign of the advantage", "advantage.rs", "(reward - centre) * leave_out", "(centre - reward) * leave_out"),
    ("n for n − 1", "advantage.rs", "(sum / (values.len() - 1) as f64).sqrt()", "(sum / values.len() as f64).sqrt()"),
    ("no eps", "advantage.rs", "std_dev_of(group) + config.eps", "std_dev_of(group)"),
    ("no eps over the batch", "advantage.rs", "std_dev_of(&rewards.concat()) + config.eps", "std_dev_of(&rewards.concat())"),
    ("group scale for batch scale", "advantage.rs", "Scale::Batch => of_batch,", "Scale::Batch => std_dev_of(group) + config.eps,"),
    ("G for G − 1 in leave-one-out", "advantage.rs", "group.len() as f64 / (group.len() - 1) as f64", "1.0"),
    ("no weight of a reward (sum)", "advantage.rs", "f64::from((*value)?) * f64::from(*weight)", "f64::from((*value)?)"),
    ("no weight of a reward (GDPO)", "advantage.rs", "f64::from(weight) * (f64::from(score) - centre) / divisor", "(f64::from(score) - centre) / divisor"),
    ("GDPO without its second normalisation", "advantage.rs", "clipped((sum - centre) / divisor, config)", "clipped(*sum, config)"),
    ("clip of advantages on one side", "advantage.rs", "advantage.clamp(-clip, clip)", "advantage.min(clip)"),
    ("share by the reward and not its part", "advantage.rs", "parts[k] * sum).sum::<f64>() / energy", "parts[k]).sum::<f64>() / energy"),
    ("sign of the surrogate", "loss/surrogate.rs", "value: -at_most(bound, free)", "value: at_most(bound, free)"),
    ("optimistic side of the clip", "loss/surrogate.rs", "-at_most(bound, free)", "-free.max(bound)"),
    ("gradient through the clip", "loss/surrogate.rs", "let moves = free <= bound && capped == ratio;", "let moves = true;"),
    ("gradient through delta", "loss/surrogate.rs", "free <= bound && capped == ratio", "free <= bound"),
    ("symmetric clip", "loss/surrogate.rs", "within(1.0 - self.clip_low, 1.0 + self.clip_high, ratio)", "within(1.0 - self.clip_low, 1.0 + self.clip_low, ratio)"),
    ("sign of the surrogate's gradient", "loss/surrogate.rs", "if moves { -ratio * advantage }", "if moves { ratio * advantage }"),
    ("no ratio in the gradient", "loss/surrogate.rs", "if moves { -ratio * advantage }", "if moves { -advantage }"),
    ("CISPO without its cap", "loss/surrogate.rs", "at_most(cap, ratio) * advantage", "ratio * advantage"),
    ("CISPO's weight differentiated", "loss/surrogate.rs", "by_log_ratio: 0.0, by_log_prob: -weight", "by_log_ratio: -weight * log_prob, by_log_prob: -weight"),
    ("SAPO's temperatures exchanged", "loss/surrogate.rs", "if advantage > 0.0 { temperature_positive }", "if advantage <= 0.0 { temperature_positive }"),
    ("SAPO's factor 4", "loss/surrogate.rs", "-advantage * 4.0 * gate / temperature", "-advantage * 2.0 * gate / temperature"),
    ("clip counted without the sign", "loss/surrogate.rs", "ratio < 1.0 - self.clip_low && advantage < 0.0", "ratio < 1.0 - self.clip_low"),
    ("NaN taken for the clip's bound", "loss/surrogate.rs", "if x < low { low } else { at_most(high, x) }", "x.max(low).min(high)"),
    ("NaN taken for the limit", "loss/surrogate.rs", "if x > limit { limit } else { x }", "x.min(limit)"),
    ("the mask dropped", "loss/mod.rs", "(0..mask.ncols()).filter(|&at| mask[[row, at]] > 0.0)", "(0..mask.ncols()).filter(|&at| mask[[row, at]] > -1.0)"),
    ("ratio of the old over the new", "loss/mod.rs", "(log_prob - f64::from(targets.old[place])).exp()", "(f64::from(targets.old[place]) - log_prob).exp()"),
    ("sum for mean in the sequence's ratio", "loss/mod.rs", "sum / places.len().max(1) as f64", "sum"),
    ("no 1/n in the sequence's gradient", "loss/mod.rs", "(shared_slope / n) as f32", "shared_slope as f32"),
    ("token ratio at the sequence level", "loss/mod.rs", "(self.objective.level == Level::Sequence).then", "(self.objective.level == Level::Token).then"),
    ("off-policy mask turned round", "loss/mod.rs", "-mean_over(sampled) > threshold", "mean_over(sampled) > threshold"),
    ("off-policy mask on good samples", "loss/mod.rs", "self.off_policy && advantage < 0.0", "self.off_policy"),
    ("old for sampled in the off-policy mask", "loss/mod.rs", "-mean_over(sampled) > threshold", "-mean_over(old) > threshold"),
    ("entropy mask dropped", "loss/mod.rs", "|| !batch.is_kept(self.row, at);", ";"),
    ("correction dropped", "loss/mod.rs", "if silenced { 0.0 } else { correction }", "if silenced { 0.0 } else { 1.0 }"),
    ("KL under the masks", "loss/mod.rs", "part.value += objective.kl_weight * part.kl;", "part.value += factor * objective.kl_weight * part.kl;"),
    ("sign of the KL's gradient", "loss/mod.rs", "part.by_log_prob += objective.kl_weight * slope * scale;", "part.by_log_prob -= objective.kl_weight * slope * scale;"),
    ("no ratio on the corrected KL", "loss/mod.rs", "if objective.kl.bias_correction { ratio } else { 1.0 }", "1.0"),
    ("no gradient through the KL's ratio", "loss/mod.rs", "part.by_log_ratio += objective.kl_weight * part.kl;", ""),
    ("sign of the entropy bonus", "loss/mod.rs", "gradient[[self.row, at]] = -weight as f32;", "gradient[[self.row, at]] = weight as f32;"),
    ("bonus over all choices", "loss/mod.rs", "self.batch.targets.gate.n_kept.max(1) as f64", "self.batch.targets.mask.sum() as f64"),
    ("row's weight dropped", "loss/mod.rs", "loss.value += weight * part.value + self", "loss.value += part.value + self"),
    ("token mean for sequence mean", "loss/tables.rs", "Aggregation::SequenceMean => 1.0 / (n_rows * length.max(1) as f64)", "Aggregation::SequenceMean => 1.0 / n_choices"),
    ("sequence mean for token mean", "loss/tables.rs", "Aggregation::TokenMean => 1.0 / n_choices", "Aggregation::TokenMean => 1.0 / (n_rows * length.max(1) as f64)"),
    ("own length for the fixed one", "loss/tables.rs", "1.0 / (n_rows * longest.max(1) as f64)", "1.0 / (n_rows * length.max(1) as f64)"),
    ("lowest entropies for the highest", "loss/tables.rs", "let rank = (1.0 - share.max(0.0)) as f32", "let rank = share as f32"),
    ("sampler over scorer", "loss/tables.rs", "f64::from(old) - f64::from(sampled)", "f64::from(sampled) - f64::from(old)"),
    ("padding in the sequence's correction", "loss/tables.rs", "if mask > 0.0 { f64::from(old)", "if mask > -1.0 { f64::from(old)"),
    ("truncation for masking", "loss/tables.rs", "Beyond::Mask if ratio < min || ratio > correction.max => 0.0,", "Beyond::Mask if ratio > correction.max => correction.max,"),
    ("no lower bound of the correction", "loss/tables.rs", "within(min, correction.max, ratio)", "ratio.min(correction.max)"),
    ("sign of k1", "loss/kl.rs", "Self::K1 => (-delta, 1.0)", "Self::K1 => (delta, -1.0)"),
    ("k2 without its half", "loss/kl.rs", "(0.5 * delta * delta, -delta)", "(delta * delta, -2.0 * delta)"),
    ("k3 turned round", "loss/kl.rs", "let delta = reference - log_prob;", "let delta = log_prob - reference;"),
    ("KL of the reward added", "metrics.rs", "let weight = -objective.kl_weight as f32;", "let weight = objective.kl_weight as f32;"),
    ("micro-batch's normaliser", "batch.rs", "weights: Array1::from(self.weights[part].to_vec())", "weights: Array1::from(row_weights(&rows.iter().map(|row| row.sampled.len()).collect::<Vec<_>>(), objective.aggregation))"),
    ("old log-probs of this moment", "batch.rs", "let old = padded(self.scored.old[part.clone()].iter().map(Vec::as_slice), shape)?;", "let old = table(log_probs.values())?;"),
    ("a skipped update taken", "optim/mod.rs", "if !norm.is_finite() {", "if false {"),
    ("reference moved all the way", "trainer.rs", "(var.as_tensor() * sync.share)?", "(var.as_tensor() * 1.0)?"),
]


def cargo():
    """The name of the first test that fails, 'compiler' where it does not build, None where all pass."""
    run = subprocess.run(["cargo", "test", "-q", *FAST, "-p", "grpo", *TESTS], cwd=ROOT, capture_output=True, text=True)
    if run.returncode == 0:
        return None
    names = re.findall(r"^    (\S+)$", run.stdout, re.M)
    return names[0] if names else "compiler"


def main():
    if cargo() is not None:
        sys.exit("the tests fail before anything is broken")
    survived = []
    print("| mutant | file | noticed by |\n|---|---|---|")
    for what, name, line, broken in MUTANTS:
        path = ROOT / "src" / name
        text = path.read_text()
        if text.count(line) != 1:
            sys.exit(f"{what}: {name} holds {text.count(line)} times: {line}")
        try:
            path.write_text(text.replace(line, broken))
            noticed = cargo()
        finally:
            path.write_text(text)
        print(f"| {what} | `{name}` | {'nothing' if noticed is None else f'`{noticed}`'} |", flush=True)
        if noticed in (None, "compiler"):
            survived.append(what)
    print(f"\n{len(MUTANTS)} mutants, {len(MUTANTS) - len(survived)} noticed")
    sys.exit(f"survived or did not compile: {', '.join(survived)}" if survived else 0)


if __name__ == "__main__":
    main()
