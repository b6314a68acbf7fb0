//! The most memory the process holds, phase by phase.

use std::fs;

use crate::observe::Metrics;

/// Reads and resets the kernel's high-water mark of this process (Linux; elsewhere there is nothing to log).
///
/// Where the mark cannot be reset, a phase's peak is that of all phases so far.
#[derive(Debug, Default)]
pub struct PeakMemory {
    /// The greatest peak so far, in GB.
    most: f64,
}

impl PeakMemory {
    /// Logs the peak of the phase that ends here, and of the run so far.
    pub fn end_phase(&mut self, phase: &str, metrics: &mut Metrics) {
        let Some(peak) = high_water_gb() else { return };
        self.most = self.most.max(peak);
        metrics.insert(format!("memory/{phase}_peak_gb"), peak);
        metrics.insert("memory/peak_gb".into(), self.most);
        reset();
    }

    /// Begins a phase after something that is none: its peak counts for the run alone.
    pub fn forget(&mut self) {
        self.most = self.most.max(high_water_gb().unwrap_or(0.0));
        reset();
    }
}

/// Sets the mark to what is held now: see proc(5). A system without it keeps the mark.
fn reset() {
    drop(fs::write("/proc/self/clear_refs", "5"));
}

fn high_water_gb() -> Option<f64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kilobytes: f64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kilobytes * 1024.0 / 1e9)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_phase_has_its_own_peak_and_the_run_the_greatest() {
        let mut memory = PeakMemory::default();
        let mut metrics = Metrics::new();
        memory.forget();
        memory.end_phase("start", &mut metrics);
        let Some(start) = metrics.get("memory/start_peak_gb").copied() else { return };
        assert!(start > 0.0);
        let large = vec![1u8; 300 << 20];
        memory.end_phase("large", &mut metrics);
        drop(std::hint::black_box(large));
        memory.end_phase("after", &mut metrics);
        memory.end_phase("small", &mut metrics);
        let peak = |phase: &str| metrics[&format!("memory/{phase}_peak_gb")];
        assert!(peak("large") > peak("start").min(peak("small")) + 0.25, "{metrics:?}");
        assert!(metrics["memory/peak_gb"] >= peak("large"));
    }
}
