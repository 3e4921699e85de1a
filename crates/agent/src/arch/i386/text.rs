/// `push`, and where the unwinder finds the register.
macro_rules! push {
    ($register:literal) => {
        concat!("push ", $register, "\n.cfi_adjust_cfa_offset 4\n.cfi_rel_offset ", $register, ", 0\n")
    };
}

/// `pop`.
macro_rules! pop {
    ($register:literal) => {
        concat!("pop ", $register, "\n.cfi_adjust_cfa_offset -4\n.cfi_restore ", $register, "\n")
    };
}

/// Pushes the arithmetic flags; eax is lost. Far cheaper than `pushf` and `popf`.
macro_rules! push_flags {
    () => {
        "lahf\nseto al\npush eax\n.cfi_adjust_cfa_offset 4\n"
    };
}

/// Pops the arithmetic flags: `add` sets OF if al was 1, `sahf` the others. eax is lost.
macro_rules! pop_flags {
    () => {
        "pop eax\n.cfi_adjust_cfa_offset -4\nadd al, 127\nsahf\n"
    };
}

/// A field of the thread's state, whose pointer is the base of the segment that the psABI leaves free.
macro_rules! of_thread {
    ($field:literal) => {
        concat!("fs:[{THREAD} + {", $field, "}]")
    };
}

/// edi = address of the shadow of the slot in edx, or less than a page if it has none: then that is how the table says so, plus something below a page.
/// `$scratch` is lost.
macro_rules! shadow_of_edx {
    ($shadow:literal, $scratch:literal, $none:expr) => {
        concat!(
            "mov ",
            $scratch,
            ", edx\n",
            "shr ",
            $scratch,
            ", {BLOCK_SHIFT}\n",
            "mov ",
            $shadow,
            ", dword ptr [trapline_shadows + 4*",
            $scratch,
            "]\n",
            "cmp ",
            $shadow,
            ", {REFUSED}\n",
            "jbe ",
            $none,
            "\n",
            "movzx ",
            $scratch,
            ", dx\n",
            "lea ",
            $shadow,
            ", [",
            $shadow,
            " + 4*",
            $scratch,
            "]\n",
        )
    };
}

/// eax = a place for a record, which nobody else will take: a signal handler that comes between any two instructions takes the next one.
/// It is none if `is_place` says so; nothing that happens to the thread's chunk from here on changes that.
macro_rules! reserve {
    () => {
        concat!("mov eax, 8\n", "xadd dword ptr ", of_thread!("POSITION"), ", eax\n")
    };
}

/// Writes a record of kind `$kind` (a constant's name) with the payload in esi to the place in eax, or jumps to `$full`, with the kind in esi too,
/// if it is none. The upper half comes last: until then the word's kind is 0, which tells the reader to wait. eax, ecx, edx and esi are lost.
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
            "mov ecx, eax\n",
            "shl esi, {UPPER_TSC_BITS}\n",
            "rdtsc\n",
            "movzx edx, dl\n",
            "or esi, edx\n",
            "mov dword ptr [ecx], eax\n",
            "mov dword ptr [ecx + 4], esi\n",
        )
    };
}

/// Stores or loads the eight vector registers, from `$at` above esp on, which is aligned to 16 bytes.
macro_rules! vectors {
    (save $at:literal) => {
        vectors!(@ concat!("movaps xmmword ptr [esp + ", $at, " + 16*"), "], xmm", "\n")
    };
    (restore $at:literal) => {
        vectors!(@ "movaps xmm", concat!(", xmmword ptr [esp + ", $at, " + 16*"), "]\n")
    };
    (@ $a:expr, $b:expr, $c:literal) => {
        concat!(
            $a, 0, $b, 0, $c, $a, 1, $b, 1, $c, $a, 2, $b, 2, $c, $a, 3, $b, 3, $c,
            $a, 4, $b, 4, $c, $a, 5, $b, 5, $c, $a, 6, $b, 6, $c, $a, 7, $b, 7, $c,
        )
    };
}
