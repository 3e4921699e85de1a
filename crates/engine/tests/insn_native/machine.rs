//! A corner of memory in which generated code runs with every register and flag given, and comes back with all of them.
//!
//! Owns [`Machine`]. Pages are either writable or executable, never both. All registers are loaded from and stored to
//! the machine's own state page by generated code, so that tests in several threads do not meet.

use std::ptr;

use iced_x86::{Code, Instruction, Register};
use trapline_engine::{Addr, Mode};

use crate::asm::{WORD_BYTES, direct, gpr, word};

/// General-purpose registers of the native mode.
pub(crate) const GPR_COUNT: usize = if WORD_BYTES == 8 { 16 } else { 8 };

const PAGE_BYTES: usize = 4096;
const PAGES: usize = 7;

const HARNESS_PAGE: usize = 0;
const FUNCTION_PAGE: usize = 1;
const STUB_PAGE: usize = 2;
const DATA_PAGE: usize = 3;
// One page lies behind the data, as far from it as the stub is from the function: what a displacement that was not
// adjusted hits.
const STACK_PAGE: usize = 5;
const STATE_PAGE: usize = 6;

/// How far away the other place for the stub is sought.
const FAR_BYTES: u64 = 5 << 30;

/// In the harness page.
const EXIT_OFFSET: usize = PAGE_BYTES / 2;

/// Indices of words in the state page, behind the general-purpose registers.
const FLAGS: usize = GPR_COUNT;
const HOST_STACK_POINTER: usize = GPR_COUNT + 1;
const ENTRY: usize = GPR_COUNT + 2;

/// CF, PF, AF, ZF, SF and OF.
pub(crate) const STATUS_FLAGS: usize = 1 | 1 << 2 | 1 << 4 | 1 << 6 | 1 << 7 | 1 << 11;

/// What the CPU holds before or after a run; general-purpose registers by number.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Registers {
    pub(crate) general: [usize; GPR_COUNT],
    pub(crate) flags: usize,
}

/// Where a machine lies in the address space.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Place {
    /// Below 2 GiB: addresses fit a sign-extended `imm32`.
    Low,
    /// Between 2 and 4 GiB: they fit 32 bits, but not so.
    Middle,
    /// Wherever the kernel likes; in a 64-bit process far above 4 GiB.
    High,
}

impl Place {
    pub(crate) const ALL: [Self; 3] = [Self::Low, Self::Middle, Self::High];
}

/// Mapped pages.
struct Pages {
    start: *mut u8,
    count: usize,
}

impl Pages {
    fn map(hint: usize, count: usize) -> Self {
        // SAFETY: a new private mapping; without MAP_FIXED the hint can replace no other.
        let start = unsafe {
            libc::mmap(
                ptr::without_provenance_mut(hint),
                count * PAGE_BYTES,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        assert_ne!(start, libc::MAP_FAILED, "no memory");
        Self { start: start.cast(), count }
    }

    fn page(&self, index: usize) -> *mut u8 {
        assert!(index < self.count);
        self.start.wrapping_add(index * PAGE_BYTES)
    }

    /// Replaces the code in a page. The rest of it becomes `filler`.
    fn write_code(&self, page: usize, offset: usize, code: &[u8], filler: u8) {
        let mut bytes = [filler; PAGE_BYTES];
        bytes[offset..][..code.len()].copy_from_slice(code);
        protect(self.page(page), libc::PROT_READ | libc::PROT_WRITE);
        self.write(page, 0, &bytes);
        protect(self.page(page), libc::PROT_READ | libc::PROT_EXEC);
    }

    /// Stores bytes in a page.
    fn write(&self, page: usize, offset: usize, bytes: &[u8]) {
        assert!(offset + bytes.len() <= PAGE_BYTES);
        let to = self.page(page).wrapping_add(offset);
        // SAFETY: (1) the place is inside the mapping, by the checks above and in `page`; (2) the page is writable:
        // pages of code are only written by `write_code`; (3) no code runs there meanwhile, and nobody has a reference:
        // the machine is not `Sync`.
        unsafe { to.copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
    }

    /// Loads bytes from a page.
    fn read(&self, page: usize, offset: usize, bytes: &mut [u8]) {
        assert!(offset + bytes.len() <= PAGE_BYTES);
        let from = self.page(page).wrapping_add(offset);
        // SAFETY: as for `write`, and pages are initialised by the kernel.
        unsafe { from.copy_to_nonoverlapping(bytes.as_mut_ptr(), bytes.len()) };
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and nothing that points into it outlives the machine.
        unsafe { libc::munmap(self.start.cast(), self.count * PAGE_BYTES) };
    }
}

fn protect(page: *mut u8, protection: i32) {
    // SAFETY: callers pass a page of their own mapping.
    let result = unsafe { libc::mprotect(page.cast(), PAGE_BYTES, protection) };
    assert_eq!(result, 0, "mprotect failed");
}

/// Pages for a function, its stub, their data and stack, and for the code that enters and leaves them.
pub(crate) struct Machine {
    pages: Pages,
    /// Another place for the stub, more than 2 GiB away if the address space has one.
    far: Pages,
}

impl Machine {
    pub(crate) fn new(place: Place) -> Self {
        let hint = match place {
            Place::Low => 0x2000_0000,
            Place::Middle => 0x9000_0000,
            Place::High => 0,
        };
        let pages = Pages::map(hint, PAGES);
        let start = pages.start.addr() as u64;
        // Above the pages that the kernel places come libraries and the stack: the hint is free below them only. And another test may have its pages there at this moment.
        let far_at = |times: u64| {
            let distance = times * FAR_BYTES;
            let hint = if place == Place::High { start.wrapping_sub(distance) } else { start.wrapping_add(distance) };
            Pages::map(usize::try_from(hint).unwrap_or(0), 1)
        };
        let is_far = |far: &Pages| {
            Mode::NATIVE == Mode::Bits32
                || (far.start.addr() as u64).abs_diff(start) > (1 << 31) + (PAGES * PAGE_BYTES) as u64
        };
        let far = (1..=16).map(far_at).find(is_far).unwrap_or_else(|| panic!("{place:?}: no room far from {start:#x}"));
        let machine = Self { pages, far };
        machine.write_harness();
        machine.fill_stack();
        machine
    }

    fn address(&self, page: usize) -> Addr {
        Addr::new(self.pages.page(page).addr() as u64)
    }

    /// Where the function under test stands.
    pub(crate) fn function(&self) -> Addr {
        self.address(FUNCTION_PAGE)
    }

    /// Where its stub goes.
    pub(crate) fn stub(&self) -> Addr {
        self.address(STUB_PAGE)
    }

    /// Another place for its stub, out of the reach of `rel32` in a 64-bit process.
    pub(crate) fn far_stub(&self) -> Addr {
        Addr::new(self.far.page(0).addr() as u64)
    }

    /// The page of data that code under test reads and writes.
    pub(crate) fn data(&self) -> Addr {
        self.address(DATA_PAGE)
    }

    /// Code that ends the run when it is jumped to.
    pub(crate) fn exit(&self) -> Addr {
        self.address(HARNESS_PAGE).offset(i64::try_from(EXIT_OFFSET).unwrap())
    }

    /// A stack pointer with half a page of room either way. The stack is full of the address of [`Machine::exit`].
    pub(crate) fn stack_pointer(&self) -> usize {
        self.pages.page(STACK_PAGE).addr() + PAGE_BYTES / 2
    }

    /// Puts `code` at [`Machine::function`], and int3 behind it.
    pub(crate) fn write_function(&mut self, code: &[u8]) {
        self.pages.write_code(FUNCTION_PAGE, 0, code, 0xcc);
    }

    /// Puts `code` at [`Machine::stub`], and `filler` behind it.
    pub(crate) fn write_stub(&mut self, code: &[u8], filler: u8) {
        self.pages.write_code(STUB_PAGE, 0, code, filler);
    }

    /// Puts `code` at [`Machine::far_stub`], and int3 behind it.
    pub(crate) fn write_far_stub(&mut self, code: &[u8]) {
        self.far.write_code(0, 0, code, 0xcc);
    }

    /// Fills the data page and its neighbour with bytes that are never the same in both.
    pub(crate) fn reset_memory(&mut self) {
        let bytes: Vec<u8> = (0..=250).cycle().take(2 * PAGE_BYTES).collect();
        self.pages.write(DATA_PAGE, 0, &bytes[..PAGE_BYTES]);
        self.pages.write(DATA_PAGE + 1, 0, &bytes[PAGE_BYTES..]);
        self.fill_stack();
    }

    /// Stores a word in the data page, `offset` bytes from its start.
    pub(crate) fn write_data(&mut self, offset: usize, value: u64) {
        let value = usize::try_from(value).expect("fits a word of the native mode");
        self.pages.write(DATA_PAGE, offset, &value.to_le_bytes());
    }

    /// The bytes of the data page.
    pub(crate) fn read_data(&self) -> Vec<u8> {
        let mut bytes = vec![0; PAGE_BYTES];
        self.pages.read(DATA_PAGE, 0, &mut bytes);
        bytes
    }

    /// The bytes of the stack from `stack_pointer` to its end.
    pub(crate) fn read_stack(&self, stack_pointer: usize) -> Vec<u8> {
        let start = self.pages.page(STACK_PAGE).addr();
        let free = stack_pointer.checked_sub(start).filter(|free| *free <= PAGE_BYTES).expect("points into the stack");
        let mut bytes = vec![0; PAGE_BYTES - free];
        self.pages.read(STACK_PAGE, free, &mut bytes);
        bytes
    }

    /// Jumps to `entry` with these registers; returns those with which the code came to [`Machine::exit`].
    ///
    /// The code must be well-behaved: it uses the machine's data and stack only, and gets to the exit.
    pub(crate) fn run(&mut self, entry: Addr, registers: &Registers) -> Registers {
        for (index, value) in registers.general.iter().enumerate() {
            self.write_state(index, *value);
        }
        self.write_state(FLAGS, registers.flags & STATUS_FLAGS | 2);
        self.write_state(ENTRY, usize::try_from(entry.value()).expect("native"));
        // SAFETY: `write_harness` put a function of this type there. It keeps what the ABI asks of it, and the code
        // under test stays inside the machine, as the caller has to see to.
        let enter = unsafe { std::mem::transmute::<*mut u8, extern "C" fn()>(self.pages.page(HARNESS_PAGE)) };
        enter();
        let mut after = Registers { general: [0; GPR_COUNT], flags: self.read_state(FLAGS) & STATUS_FLAGS };
        for (index, value) in after.general.iter_mut().enumerate() {
            *value = self.read_state(index);
        }
        after
    }

    fn fill_stack(&self) {
        let exit = usize::try_from(self.exit().value()).expect("native");
        self.pages.write(STACK_PAGE, 0, &exit.to_le_bytes().repeat(PAGE_BYTES / WORD_BYTES));
    }

    fn write_state(&mut self, index: usize, value: usize) {
        self.pages.write(STATE_PAGE, index * WORD_BYTES, &value.to_le_bytes());
    }

    fn read_state(&self, index: usize) -> usize {
        let mut bytes = [0; WORD_BYTES];
        self.pages.read(STATE_PAGE, index * WORD_BYTES, &mut bytes);
        usize::from_le_bytes(bytes)
    }

    /// ```text
    /// enter:  push the callee-saved registers; save the stack pointer
    ///         load flags, then all registers, the stack pointer last; jmp *entry
    /// exit:   store all registers; load the stack pointer; store the flags
    ///         cld; pop the callee-saved registers; ret
    /// ```
    fn write_harness(&self) {
        let state = |index: usize| direct(self.address(STATE_PAGE).offset(i64::try_from(index * WORD_BYTES).unwrap()));
        let stack_pointer = gpr(4);
        let callee_saved: &[usize] = if WORD_BYTES == 8 { &[3, 5, 12, 13, 14, 15] } else { &[3, 5, 6, 7] };
        let load = word(Code::Mov_r32_rm32, Code::Mov_r64_rm64);
        let store = word(Code::Mov_rm32_r32, Code::Mov_rm64_r64);
        let (push, pop) = (word(Code::Push_r32, Code::Push_r64), word(Code::Pop_r32, Code::Pop_r64));
        let with_1 = |code, register: Register| Instruction::with1(code, register).unwrap();
        let loaded = |register, from| Instruction::with2(load, register, from).unwrap();
        let stored = |to, register| Instruction::with2(store, to, register).unwrap();

        let mut enter: Vec<Instruction> = callee_saved.iter().map(|register| with_1(push, gpr(*register))).collect();
        enter.push(stored(state(HOST_STACK_POINTER), stack_pointer));
        enter.push(Instruction::with1(word(Code::Push_rm32, Code::Push_rm64), state(FLAGS)).unwrap());
        enter.push(Instruction::with(word(Code::Popfd, Code::Popfq)));
        let others = || (0..GPR_COUNT).filter(|register| gpr(*register) != stack_pointer);
        enter.extend(others().chain([4]).map(|register| loaded(gpr(register), state(register))));
        enter.push(Instruction::with1(word(Code::Jmp_rm32, Code::Jmp_rm64), state(ENTRY)).unwrap());

        let mut exit: Vec<Instruction> =
            (0..GPR_COUNT).map(|register| stored(state(register), gpr(register))).collect();
        exit.push(loaded(stack_pointer, state(HOST_STACK_POINTER)));
        exit.push(Instruction::with(word(Code::Pushfd, Code::Pushfq)));
        exit.push(Instruction::with1(word(Code::Pop_rm32, Code::Pop_rm64), state(FLAGS)).unwrap());
        exit.push(Instruction::with(Code::Cld));
        exit.extend(callee_saved.iter().rev().map(|register| with_1(pop, gpr(*register))));
        exit.push(Instruction::with(word(Code::Retnd, Code::Retnq)));

        let mut code = crate::asm::assemble(self.address(HARNESS_PAGE), &enter);
        assert!(code.len() <= EXIT_OFFSET);
        code.resize(EXIT_OFFSET, 0xcc);
        code.extend(crate::asm::assemble(self.exit(), &exit));
        self.pages.write_code(HARNESS_PAGE, 0, &code, 0xcc);
    }
}

#[test]
fn registers_come_back_as_they_went_in() {
    assert_eq!(Mode::NATIVE.word_bytes() as usize, WORD_BYTES);
    for place in Place::ALL {
        let mut machine = Machine::new(place);
        let mut registers = Registers { general: [0; GPR_COUNT], flags: STATUS_FLAGS };
        for (number, register) in registers.general.iter_mut().enumerate() {
            *register = 0x1111_1111 * number;
        }
        registers.general[4] = machine.stack_pointer();
        assert_eq!(machine.run(machine.exit(), &registers), registers, "{place:?}");
        registers.flags = 0;
        assert_eq!(machine.run(machine.exit(), &registers), registers, "{place:?}");
    }
}
