//! What is handed to kernels: numbers, and structures that lie in memory as their namesakes in the kernels do.

#![expect(unsafe_code, reason = "that a structure lies as the kernel's does is for its author to promise")]

use candle_core::cuda_backend::cudarc::driver::{DeviceRepr, LaunchArgs, PushKernelArg};

/// A kernel's argument.
pub(super) trait Argument {
    fn push<'a>(&'a self, to: &mut LaunchArgs<'a>);
}

/// Declares what may be handed to a kernel by value.
macro_rules! arguments {
    ($($kind:ty),*) => {
        $(impl Argument for $kind {
            fn push<'a>(&'a self, to: &mut LaunchArgs<'a>) {
                to.arg(self);
            }
        })*
    };
}

/// attention.cu's `Shape`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(super) struct Heads {
    pub(super) heads: i32,
    pub(super) kv_heads: i32,
    pub(super) tokens: i32,
    pub(super) scale: f32,
}

/// sample.cu's `Shaping`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(super) struct LawOfRows {
    pub(super) guidance: f32,
    pub(super) temperature: f32,
    pub(super) top_p: f32,
    pub(super) min_p: f32,
    pub(super) top_k: i32,
    pub(super) greedy: i32,
}

/// sample.cu's `Draw`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(super) struct DrawOfRows {
    pub(super) uniforms: u64,
    pub(super) step: u64,
    pub(super) choices: u64,
    pub(super) log_probs: u64,
    pub(super) ids: u64,
    pub(super) fault: u64,
    pub(super) n_tokens: i32,
    pub(super) offset: u32,
}

/// optimise.cu's `Step`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(super) struct StepOfAdamW(pub(super) [f32; 7]);

// SAFETY: plain numbers, laid out as their namesakes in the kernels.
unsafe impl DeviceRepr for Heads {}
// SAFETY: as above.
unsafe impl DeviceRepr for LawOfRows {}
// SAFETY: as above.
unsafe impl DeviceRepr for DrawOfRows {}
// SAFETY: as above.
unsafe impl DeviceRepr for StepOfAdamW {}

arguments!(u64, i32, f32, usize, Heads, LawOfRows, DrawOfRows, StepOfAdamW);
