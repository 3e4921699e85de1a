//! The serial ports and the end: everything that the testbed says is one line of JSON on the first port, to be read by `cargo xtask kernel-test`; a trace's
//! records go to the second one as they are.

use core::{arch::asm, fmt};

/// COM1.
const PORT: u16 = 0x3f8;
/// COM2.
const SECOND_PORT: u16 = 0x2f8;
/// What the port takes at once with its FIFO on.
const FIFO_BYTES: usize = 16;
/// QEMU's isa-debug-exit: writing `v` ends QEMU with status `2 * v + 1`.
const EXIT_PORT: u16 = 0xf4;

/// Writes a byte to an I/O port.
pub fn outb(port: u16, value: u8) {
    // SAFETY: the ports that are written here belong to devices that this kernel alone drives.
    unsafe { asm!("out dx, al", in("dx") port, in("al") value, options(nomem, nostack, preserves_flags)) };
}

/// Reads a byte from an I/O port.
pub fn inb(port: u16) -> u8 {
    let value;
    // SAFETY: as in `outb`.
    unsafe { asm!("in al, dx", in("dx") port, out("al") value, options(nomem, nostack, preserves_flags)) };
    value
}

/// The serial port, as something to write to.
pub struct Serial;

impl fmt::Write for Serial {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            while inb(PORT + 5) & 0x20 == 0 {}
            outb(PORT, byte);
        }
        Ok(())
    }
}

/// Sends bytes to the second serial port.
pub fn send(bytes: &[u8]) {
    // FIFO control: on, and emptied.
    outb(SECOND_PORT + 2, 0x07);
    for chunk in bytes.chunks(FIFO_BYTES) {
        while inb(SECOND_PORT + 5) & 0x20 == 0 {}
        for byte in chunk {
            outb(SECOND_PORT, *byte);
        }
    }
}

/// Prints a line.
#[macro_export]
macro_rules! say {
    ($($argument:tt)*) => {{
        use core::fmt::Write as _;
        let _ = writeln!($crate::serial::Serial, $($argument)*);
    }};
}

/// Ends the machine.
pub fn exit(success: bool) -> ! {
    let code: u32 = if success { 0x10 } else { 0x11 };
    // SAFETY: the device is part of the machine that `kernel-test` describes to QEMU.
    unsafe { asm!("out dx, eax", in("dx") EXIT_PORT, in("eax") code, options(nomem, nostack, preserves_flags)) };
    loop {
        // SAFETY: stopping a CPU has no effect on memory.
        unsafe { asm!("cli", "hlt", options(nomem, nostack)) };
    }
}
