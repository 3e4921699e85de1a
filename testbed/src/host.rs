//! The engine's host in a kernel: text is written through an alias, cores are synchronised by an IPI, threads are found through gs.
//!
//! Owns [`KernelHost`], all that the engine needs to know of this kernel. Invariant: as [`Host`]'s.

use alloc::vec::Vec;
use core::{
    fmt,
    sync::atomic::{AtomicUsize, Ordering},
};

use trapline_engine::{
    Addr, AddrRange, Host, Mode,
    insn::INT3,
    poke::TextWrite,
    trampoline::{Machine, Segment, ThreadBase, VectorSave},
};

use crate::{apic, cpu, paging, scenario, step, thread::Thread, trap};

/// CPUs besides the poking one.
pub static OTHERS: AtomicUsize = AtomicUsize::new(0);

/// What can go wrong in this kernel.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum KernelError {
    /// The memory for trampolines is used up.
    NoCodeMemory,
}

impl fmt::Display for KernelError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the memory for trampolines is used up")
    }
}

/// This kernel.
#[derive(Debug)]
pub struct KernelHost {
    /// Whether slots are the CPU's, and not the thread's.
    pub per_cpu: bool,
    /// How many NMIs every other CPU gets at each step of a poke, and at most as many again while it is waited for.
    pub nmis: usize,
    /// Leaves out the int3 phase: the defect, to be shown.
    pub without_int3: bool,
    /// Stores everything again when all CPUs have synchronised. QEMU's TCG (7.2) notices that code changes only once its translation is
    /// complete: a CPU that was translating the old bytes meanwhile goes on executing them, and no instruction of its own helps. When it has
    /// taken the IPI that translation is complete, and storing the same bytes again discards it. Real CPUs need none of this.
    pub store_again: bool,
    last_writes: Vec<TextWrite>,
    /// Whether the last writes were int3s, and the scenario `step` wants them to stay for a while.
    holding: bool,
    /// Barriers that were asked for.
    pub syncs: u64,
    next_code: usize,
}

impl KernelHost {
    /// A host whose code memory is empty.
    pub fn new(per_cpu: bool) -> Self {
        Self {
            per_cpu,
            nmis: 0,
            without_int3: false,
            store_again: false,
            last_writes: Vec::new(),
            syncs: 0,
            holding: false,
            next_code: paging::code_start(),
        }
    }

    fn send_nmis(&self, count: usize) {
        for _ in 0..count {
            let taken = trap::NMIS.load(Ordering::Relaxed);
            apic::nmi_others();
            // A second NMI while one is pending is none: wait until somebody takes it, but not for ever.
            let mut patience = 2000;
            while trap::NMIS.load(Ordering::Relaxed) == taken && patience > 0 {
                patience -= 1;
                core::hint::spin_loop();
            }
        }
    }
}

impl Host for KernelHost {
    type Error = KernelError;

    fn machine(&self) -> Machine {
        let (pointer, offset) = if self.per_cpu {
            (None, cpu::SLOTS_OF_CPU)
        } else {
            (Some(cpu::CURRENT as i64), core::mem::offset_of!(Thread, state))
        };
        let thread = ThreadBase { segment: Segment::Gs, pointer, offset: offset as i64 };
        Machine { mode: Mode::NATIVE, thread, vectors: VectorSave::Never }
    }

    fn read_text(&mut self, at: Addr, bytes: &mut [u8]) -> Result<(), KernelError> {
        for (byte, address) in bytes.iter_mut().zip(at.value() as usize..) {
            *byte = paging::text_byte(address);
        }
        Ok(())
    }

    fn write_text(&mut self, writes: impl Iterator<Item = TextWrite>) -> Result<(), KernelError> {
        self.holding = false;
        for write in writes {
            self.holding |= *write.bytes == [INT3] && step::holds();
            if self.without_int3 && *write.bytes == [INT3] {
                continue;
            }
            paging::write_text(write.at.value() as usize, &write.bytes);
            if self.store_again {
                self.last_writes.push(write);
            }
        }
        self.send_nmis(self.nmis);
        Ok(())
    }

    fn sync_cores(&mut self) -> Result<(), KernelError> {
        self.syncs += 1;
        let mut nmis = self.nmis;
        trap::SYNCED.store(0, Ordering::Relaxed);
        apic::interrupt_others(trap::SYNC_VECTOR);
        // Acquire: pairs with the Release in `trap::sync`.
        while trap::SYNCED.load(Ordering::Acquire) < OTHERS.load(Ordering::Relaxed) {
            if nmis > 0 {
                // A CPU that has not answered is in an interrupt, most likely: that is where NMIs are rare otherwise.
                self.send_nmis(1);
                nmis -= 1;
                continue;
            }
            // Not a spin: an emulated machine has fewer CPUs below it than it shows.
            cpu::wait_for_interrupt();
        }
        for write in self.last_writes.drain(..) {
            paging::write_text(write.at.value() as usize, &write.bytes);
        }
        while self.holding && step::holds() {
            cpu::wait_for_interrupt();
        }
        Ok(())
    }

    fn alloc_code(&mut self, _near: AddrRange, len_bytes: usize) -> Result<Addr, KernelError> {
        let at = self.next_code.next_multiple_of(16);
        if at + len_bytes > paging::text().end {
            return Err(KernelError::NoCodeMemory);
        }
        self.next_code = at + len_bytes;
        Ok(Addr::new(at as u64))
    }

    fn write_code(&mut self, at: Addr, code: &[u8]) -> Result<(), KernelError> {
        paging::write_text(at.value() as usize, code);
        Ok(())
    }

    fn free_code(&mut self, _code: AddrRange) {
        // An engine's trampolines are given back with the engine: the next one begins at the start again.
    }

    fn is_unused(&mut self, _ranges: &[AddrRange]) -> Result<bool, KernelError> {
        // A parked thread is in no callback and in no trampoline. While one runs, not to know is to wait.
        Ok(scenario::all_parked())
    }

    fn relax(&mut self) {
        core::hint::spin_loop();
    }
}
