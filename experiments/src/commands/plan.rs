//! What a training run will hold in memory, and what it held.

use grpo::{Policy, Prompt, RunFolder};
use grpo_policies::simplear::{SimpleAr, Workload};

use crate::config::TrainFile;
use crate::failure::Outcome;

const PHASES: [&str; 3] = ["rollout", "reference", "update"];

/// The tokens of the longest prompt as the policy's law puts it.
pub fn longest_prompt(policy: &SimpleAr, prompts: &[Prompt]) -> Outcome<usize> {
    let mut longest = 0;
    for prompt in prompts {
        longest = longest.max(policy.prompt_ids(&prompt.text, &policy.law().prefix)?.len());
    }
    Ok(longest)
}

/// Shapes, parameters, tokens and the memory of each phase of a step, as text.
pub fn describe(policy: &SimpleAr, file: &TrainFile, prompt_tokens: usize) -> String {
    let (shape, (rows, columns)) = (policy.decoder().config(), policy.grid());
    let side = policy.cosmos().config().spatial_compression;
    let n_codes = policy.cosmos().n_codes() as usize;
    let work = workload(file, prompt_tokens);
    let n_samples = file.rollout.prompts_per_step * file.rollout.group_size.get();
    let million = |n: usize| format!("{:.2} M", n as f64 / 1e6);
    let lines = [
        format!(
            "decoder     {} layers of {} ({} heads, {} of keys), feed-forward {}, {} text ids and {n_codes} codes",
            shape.num_hidden_layers,
            shape.hidden_size,
            shape.num_attention_heads,
            shape.num_key_value_heads,
            shape.intermediate_size,
            shape.vocab_size - n_codes,
        ),
        format!(
            "parameters  {}, {} trainable, f32; visual tokenizer {}",
            million(policy.decoder().n_elements()),
            million(Policy::params(policy).n_elements()),
            million(policy.cosmos().n_elements())
        ),
        format!("image       {} x {} px = {rows} x {columns} = {} tokens", rows * side, columns * side, rows * columns),
        format!(
            "step        {} prompts of at most {prompt_tokens} tokens x {} samples = {} tokens drawn; {} rows a backward \
             pass",
            file.rollout.prompts_per_step,
            file.rollout.group_size.get(),
            n_samples * rows * columns,
            work.backward_rows
        ),
        memory(policy, &work),
        "nothing was run".into(),
    ];
    lines.join("\n")
}

fn workload(file: &TrainFile, prompt_tokens: usize) -> Workload {
    let (rollout, group) = (&file.rollout, file.rollout.group_size.get());
    let n_samples = rollout.prompts_per_step * group;
    Workload {
        rollout_rows: ((rollout.rows_per_call / group).max(1) * group).min(n_samples),
        prompt_tokens,
        backward_rows: rollout.rows_per_backward.min(n_samples),
        n_parts: n_samples.div_ceil(rollout.rows_per_backward),
        parts_at_once: rollout.parts_at_once,
        reference: file.objective.needs_reference(),
    }
}

fn memory(policy: &SimpleAr, work: &Workload) -> String {
    let memory = policy.memory(work);
    let gb = |bytes: u64| format!("{:.2} GB", bytes as f64 / 1e9);
    let phases = [memory.rollout, memory.reference_pass, memory.update];
    let phases = PHASES.into_iter().zip(phases).map(|(phase, bytes)| format!("{phase} {}", gb(bytes)));
    format!(
        "memory      weights {}, reference {}, optimiser {}, visual tokenizer {}\npeaks       {} (estimates)",
        gb(memory.weights),
        gb(memory.reference),
        gb(memory.optimizer),
        gb(memory.tokenizer),
        phases.collect::<Vec<_>>().join(", ")
    )
}

/// The greatest peak of each phase that the run logged; `None` where the system tells none.
pub fn peaks(run: &RunFolder) -> Outcome<Option<String>> {
    let curves = grpo::chart::curves(run)?;
    let peak = |phase: &str| {
        let curve = curves.get(&format!("memory/{phase}_peak_gb"))?;
        let most = curve.iter().map(|(_, value)| *value).fold(0.0, f64::max);
        Some(format!("{phase} {most:.2} GB"))
    };
    let peaks: Vec<String> = PHASES.into_iter().filter_map(peak).collect();
    Ok((!peaks.is_empty()).then(|| peaks.join(", ")))
}
