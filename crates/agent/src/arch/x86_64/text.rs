/// `push`, and where the unwinder finds the register.
macro_rules! push {
    ($register:literal) => {
        concat!("push ", $register, "\n.cfi_adjust_cfa_offset 8\n.cfi_rel_offset ", $register, ", 0\n")
    };
}

/// `pop`.
macro_rules! pop {
    ($register:literal) => {
        concat!("pop ", $register, "\n.cfi_adjust_cfa_offset -8\n.cfi_restore ", $register, "\n")
    };
}

/// Pushes the arithmetic flags; rax is lost. Far cheaper than `pushf` and `popf`.
macro_rules! push_flags {
    () => {
        "lahf\nseto al\npush rax\n.cfi_adjust_cfa_offset 8\n"
    };
}

/// Pops the arithmetic flags: `add` sets OF if al was 1, `sahf` the others. rax is lost.
macro_rules! pop_flags {
    () => {
        "pop rax\n.cfi_adjust_cfa_offset -8\nadd al, 127\nsahf\n"
    };
}

/// The segment whose base is the thread pointer: the one of thread-local storage, which the dynamic linker gives room in. An agent that comes into a
/// process later finds no room there; its threads get a base of their own in the other segment, which the psABI leaves free.
#[cfg(not(feature = "injected"))]
macro_rules! thread_segment {
    () => {
        "fs"
    };
}

/// See above.
#[cfg(feature = "injected")]
macro_rules! thread_segment {
    () => {
        "gs"
    };
}

/// A field of the thread's state, with rcx as below.
macro_rules! of_thread {
    ($field:literal) => {
        concat!(thread_segment!(), ":[rcx + {", $field, "}]")
    };
}

/// rcx = distance of the thread's state from the thread pointer.
macro_rules! thread_in_rcx {
    () => {
        "mov rcx, qword ptr [rip + trapline_thread@GOTTPOFF]\n"
    };
}

/// `$shadow` = address of the shadow of the slot in rdx: `shadow_address`.
macro_rules! shadow_of_rdx {
    ($shadow:literal) => {
        concat!(
            "movabs ",
            $shadow,
            ", {SHADOW_BASE}\n",
            "lea ",
            $shadow,
            ", [",
            $shadow,
            " + 2*rdx]\n",
            "shl ",
            $shadow,
            ", {ABOVE_ADDRESS}\n",
            "shr ",
            $shadow,
            ", {ABOVE_ADDRESS}\n",
        )
    };
}

/// rax = a place for a record, which nobody else will take: a signal handler that comes between any two instructions takes the next one.
/// It is none if `is_place` says so; nothing that happens to the thread's chunk from here on changes that.
macro_rules! reserve {
    () => {
        concat!("mov eax, 8\n", "xadd qword ptr ", of_thread!("POSITION"), ", rax\n")
    };
}

/// Writes a record of kind `$kind` (a constant's name) with the payload in esi to the place in rax, or jumps to `$full`, with the kind in esi too,
/// if it is none. The store comes last: until then the word is zero, which tells the reader to wait. rax, rcx, rdx and rsi are lost.
macro_rules! write_record {
    ($kind:literal, $full:expr) => {
        concat!(
            "or esi, {",
            $kind,
            "} << {PAYLOAD_BITS}\n",
            "test ah, {PLACE_IN_AH}\n",
            "jz ",
            $full,
            "\n",
            "mov rcx, rax\n",
            "shl esi, {UPPER_TSC_BITS}\n",
            "rdtsc\n",
            "mov sil, dl\n",
            "shl rsi, 32\n",
            "or rax, rsi\n",
            "mov qword ptr [rcx], rax\n",
        )
    };
}

/// Stores or loads the sixteen vector registers, at rsp, which is aligned to 16 bytes.
macro_rules! vectors {
    (save) => {
        vectors!(@ "movaps xmmword ptr [rsp + 16*", "], xmm", "\n")
    };
    (restore) => {
        vectors!(@ "movaps xmm", ", xmmword ptr [rsp + 16*", "]\n")
    };
    (@ $a:literal, $b:literal, $c:literal) => {
        concat!(
            $a, 0, $b, 0, $c, $a, 1, $b, 1, $c, $a, 2, $b, 2, $c, $a, 3, $b, 3, $c,
            $a, 4, $b, 4, $c, $a, 5, $b, 5, $c, $a, 6, $b, 6, $c, $a, 7, $b, 7, $c,
            $a, 8, $b, 8, $c, $a, 9, $b, 9, $c, $a, 10, $b, 10, $c, $a, 11, $b, 11, $c,
            $a, 12, $b, 12, $c, $a, 13, $b, 13, $c, $a, 14, $b, 14, $c, $a, 15, $b, 15, $c,
        )
    };
}
