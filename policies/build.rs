//! Compiles the CUDA kernels where the feature asks for them: to PTX, which the driver compiles for its own card.

use std::path::PathBuf;
use std::process::Command;

/// The least card: bf16 on tensor cores came with it.
const ARCHITECTURE: &str = "compute_80";

fn main() -> Result<(), String> {
    println!("cargo:rerun-if-changed=src/cuda/kernels");
    println!("cargo:rerun-if-env-changed=NVCC");
    if std::env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return Ok(());
    }
    let variable = |name: &str| std::env::var(name).map_err(|error| format!("{name}: {error}"));
    let out = PathBuf::from(variable("OUT_DIR")?).join("kernels.ptx");
    let nvcc = std::env::var("NVCC").unwrap_or_else(|_| "nvcc".into());
    if nvcc.contains('/') {
        println!("cargo:rerun-if-changed={nvcc}");
    }
    let mut command = Command::new(&nvcc);
    command.args(["--ptx", "-std=c++17", "-O3", "-arch", ARCHITECTURE, "-o"]).arg(&out);
    let status = command.arg("src/cuda/kernels/kernels.cu").status().map_err(|error| {
        format!("{nvcc}: {error}; install CUDA 13, or see policies/cuda/toolchain.sh for a compiler from a package")
    })?;
    if status.success() { Ok(()) } else { Err(format!("{nvcc}: {status}")) }
}
