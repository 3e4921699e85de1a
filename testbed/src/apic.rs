//! The local APIC: one-shot timer, IPIs, and the start of the other CPUs.

use core::ptr;

use crate::serial::inb;

const BASE: usize = 0xfee0_0000;
const EOI: usize = 0xb0;
const SPURIOUS: usize = 0xf0;
const COMMAND: usize = 0x300;
const COMMAND_DESTINATION: usize = 0x310;
const TIMER: usize = 0x320;
const TIMER_COUNT: usize = 0x380;
const TIMER_DIVIDE: usize = 0x3e0;

/// Destination shorthand "myself", level asserted.
const SELF: u32 = 0x4_4000;
/// Destination shorthand "all but myself", level asserted.
const OTHERS: u32 = 0xc_4000;

fn write(register: usize, value: u32) {
    // SAFETY: paging maps the APIC's page uncached, and only its owner CPU reaches it there.
    unsafe { ((BASE + register) as *mut u32).write_volatile(value) };
}

fn read(register: usize) -> u32 {
    // SAFETY: as in `write`.
    unsafe { ((BASE + register) as *const u32).read_volatile() }
}

/// Enables this CPU's APIC.
pub fn enable() {
    write(SPURIOUS, 0x1ff);
    write(TIMER_DIVIDE, 0xb);
}

/// Acknowledges an interrupt.
pub fn end_of_interrupt() {
    write(EOI, 0);
}

/// Lets the timer interrupt once, `ticks` from now.
pub fn arm_timer(vector: u8, ticks: u32) {
    write(TIMER, u32::from(vector));
    write(TIMER_COUNT, ticks);
}

/// Interrupts the first CPU.
pub fn interrupt_first(vector: u8) {
    while read(COMMAND) & 0x1000 != 0 {}
    write(COMMAND_DESTINATION, 0);
    write(COMMAND, 0x4000 | u32::from(vector));
}

fn command(command: u32) {
    while read(COMMAND) & 0x1000 != 0 {}
    write(COMMAND, command);
}

fn command_others(command: u32) {
    self::command(command | OTHERS);
}

/// Interrupts this CPU, as soon as it takes interrupts.
pub fn interrupt_self(vector: u8) {
    command(u32::from(vector) | SELF);
}

/// Interrupts all other CPUs.
pub fn interrupt_others(vector: u8) {
    command_others(u32::from(vector));
}

/// Sends an NMI to all other CPUs.
pub fn nmi_others() {
    command_others(0x400);
}

/// Starts the other CPUs: INIT, then twice a start-up IPI that leads to the code copied to 0x8000.
pub fn start_others() {
    unsafe extern "C" {
        static real_mode_start: u8;
        static real_mode_end: u8;
    }
    let start = &raw const real_mode_start;
    let len = (&raw const real_mode_end).addr() - start.addr();
    // SAFETY: both ranges are mapped; nothing else lies at 0x8000.
    unsafe { ptr::copy_nonoverlapping(start, 0x8000 as *mut u8, len) };
    command_others(0x500);
    delay(10_000);
    command_others(0x608);
    delay(200);
    command_others(0x608);
}

/// Waits about `steps` microseconds: an access to an unused port takes one.
fn delay(steps: u32) {
    for _ in 0..steps {
        inb(0x80);
    }
}
