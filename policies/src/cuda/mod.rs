//! The decoder on NVIDIA's cards: kernels of our own beside cuBLAS, driven by hand, layer by layer.
//!
//! | file | what |
//! |---|---|
//! | gpu.rs, arguments.rs | memory, kernels by name, launches and what they take: the only places with `unsafe` |
//! | products.rs | cuBLAS by what a product means to a layer |
//! | weights.rs | a decoder's weights in the type that products take |
//! | batch.rs | rows of ids as the kernels read them |
//! | layer.rs | a layer's way forward |
//! | back.rs | a layer's way back |
//! | head.rs | log-probabilities, a chunk of tokens at a time, and back |
//! | tape.rs | scores of a batch, and the gradients of all weights |
//! | rollout.rs | whole images drawn: prompts, cache, a step as a graph |
//! | optimise.rs | AdamW and the gradient's norm |
//!
//! 1. The residual stream, sums, statistics and gradients of weights are f32 whatever the type of the rest.
//! 2. Every kernel adds in an order that depends on shapes alone: equal inputs give equal bits. cuBLAS may choose another
//!    algorithm for another number of rows, so numbers of a row can differ in their last bits with the batch.
//! 3. All work is on the device's one stream; memory is freed in that stream's order, so nothing here waits for the card
//!    but what brings numbers back.
//! 4. tests/cuda.rs holds every kernel and both passes to the CPU's, on a card or on the simulator of tests/simulator.

mod arguments;
mod back;
mod batch;
mod gpu;
mod head;
mod layer;
mod optimise;
mod products;
mod rollout;
mod tape;
mod weights;

use candle_core::Device;
use grpo::Result;

pub(crate) use optimise::CudaOptimiser;
pub(crate) use rollout::{Job, draw};
pub(crate) use tape::{CudaTape, rows_that_fit};

use crate::decoder::Decoder;

/// The device of an ordinal, prepared for [`crate::decoder`]: one stream for all threads, freed memory kept.
///
/// candle's own `Device::new_cuda` gives every thread a stream of its own, across which nothing here waits.
pub fn device(ordinal: usize) -> Result<Device> {
    let device = Device::new_cuda_with_stream(ordinal)?;
    gpu::Gpu::on(&device)?.keep_freed_memory()?;
    Ok(device)
}

/// Numbers of a token that rms_norm_back's block holds, of the 48 KB that every card has.
const WIDEST: usize = 12_000;

/// Whether the kernels here serve a decoder; candle's operations do where not.
pub(crate) fn serves(decoder: &Decoder) -> bool {
    let config = decoder.config();
    let shaped = matches!(config.head_dim(), 32 | 64 | 128)
        && config.num_attention_heads / config.num_key_value_heads.max(1) <= 16
        && config.hidden_size <= WIDEST
        && [config.hidden_size, config.intermediate_size].iter().all(|width| width.is_multiple_of(4));
    decoder.device().is_cuda() && shaped && decoder.lora().is_none()
}
