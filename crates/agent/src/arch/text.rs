/// What stands in front of a function's first instruction.
macro_rules! begin_function {
    ($name:literal) => {
        concat!(
            ".p2align 6\n.hidden ",
            $name,
            "\n.globl ",
            $name,
            "\n.type ",
            $name,
            ", @function\n",
            $name,
            ":\n.cfi_startproc\n"
        )
    };
}

/// And behind its last one.
macro_rules! end_function {
    ($name:literal) => {
        concat!(".cfi_endproc\n.size ", $name, ", . - ", $name, "\n")
    };
}
