//! Sites for single Rust functions, on stable Rust.
//!
//! Owns [`traceable!`]: a naked entry of one 5-byte nop and a jump, listed in `__patchable_function_entries` as a compiler would.
//! [`discover`](crate::discover) finds it like any other. Invariant: the entry is the function's only address, so every call passes the site.

/// Makes `extern "C"` functions traceable.
///
/// Each becomes an entry of one 5-byte nop (the site, named after the function) and a jump to the body. That costs a nanosecond or less a
/// call; programs compiled with `-Zpatchable-function-entry=5` do not need it.
///
/// ```
/// trapline_process::traceable! {
///     /// Adds.
///     pub extern "C" fn add(a: u32, b: u32) -> u32 {
///         a + b
///     }
/// }
/// assert_eq!(add(2, 3), 5);
/// ```
#[macro_export]
macro_rules! traceable {
    ($($(#[$meta:meta])* $visibility:vis extern "C" fn $name:ident($($argument:ident: $type:ty),* $(,)?) $(-> $result:ty)? $body:block)*) => {
        $(
            $(#[$meta])*
            #[unsafe(naked)]
            $visibility extern "C" fn $name($($argument: $type),*) $(-> $result)? {
                extern "C" fn body($($argument: $type),*) $(-> $result)? $body
                ::core::arch::naked_asm!(
                    // nop dword ptr [rax + rax]: SDM volume 2, table 4-12.
                    "2: .byte 0x0f, 0x1f, 0x44, 0x00, 0x00",
                    "jmp {body}",
                    // Linked to the function's section ("o"), so that both are kept or discarded together.
                    ".pushsection __patchable_function_entries, \"awo\", @progbits, {entry}",
                    ".balign {word}",
                    $crate::__traceable_entry!(),
                    ".popsection",
                    entry = sym $name,
                    body = sym body,
                    word = const ::core::mem::size_of::<usize>(),
                )
            }
        )*
    };
}

/// The record of a [`traceable!`] function: a word of the target's width.
#[doc(hidden)]
#[macro_export]
#[cfg(target_pointer_width = "64")]
macro_rules! __traceable_entry {
    () => {
        ".quad 2b"
    };
}

/// The record of a [`traceable!`] function: a word of the target's width.
#[doc(hidden)]
#[macro_export]
#[cfg(target_pointer_width = "32")]
macro_rules! __traceable_entry {
    () => {
        ".long 2b"
    };
}
