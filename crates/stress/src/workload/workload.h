/*
 * What the C and assembly parts of the workload share with each other and with workload.rs and registers.rs.
 * The numbers are compared with the Rust side's by a test, through stress_layout.
 */
#ifndef TRAPLINE_STRESS_WORKLOAD_H
#define TRAPLINE_STRESS_WORKLOAD_H

/* Traced functions, stress_fn_0000 and so on. The first STRESS_PROBES are in registers.S, the others in functions.c. */
#define STRESS_FUNCTIONS 1024
#define STRESS_PROBES 4
#define STRESS_ARGUMENTS 8
/* Ops that a call may be seen by. */
#define STRESS_OPS 16

/* Offsets in the struct registers of registers.rs, bytes. */
#define REGISTERS_VECTORS 0
#define REGISTERS_MASKS 2048
#define REGISTERS_X87 2112
#define REGISTERS_MXCSR 2240
#define REGISTERS_X87_CONTROL 2244
#define REGISTERS_FLAGS 2248
#define REGISTERS_GENERAL (REGISTERS_FLAGS + WORD)

/* Which vector registers the CPU has, as registers.rs finds out: each level has those of the one before. */
#define VECTORS_SSE 0
#define VECTORS_AVX 1
#define VECTORS_AVX512 2

#ifdef __x86_64__
#define WORD 8
/* Of the instruction pointer in a CallFrame, words. */
#define STRESS_FRAME_IP 17
#else
#define WORD 4
#define STRESS_FRAME_IP 9
#endif

/* Of `own` in struct stress_counters, bytes. */
#define STRESS_OWN ((2 + STRESS_OPS) * WORD)

#ifndef __ASSEMBLER__
#include <stddef.h>
#include <stdint.h>

/* Nothing here is seen outside of the executable, so nothing has to go through its GOT or PLT. */
#pragma GCC visibility push(hidden)

/* What one context of a thread has counted. Only that context writes it, so that plain increments are exact. */
struct stress_counters {
    /* What callbacks must find as the frame's instruction pointer during the current call. */
    unsigned long behind_site;
    /* All bits in which one of them found something else. */
    unsigned long stray;
    /* How often the callback of each ops ran. */
    unsigned long seen[STRESS_OPS];
    /* How often each function ran. */
    uint32_t own[STRESS_FUNCTIONS];
};
_Static_assert(offsetof(struct stress_counters, own) == STRESS_OWN, "registers.S relies on it");

/*
 * The counters of the context that the thread runs now: of its main loop, or of the signal handler that interrupted it. Local-exec, the
 * model with the fewest instructions: this code is only ever linked into executables.
 */
extern __thread struct stress_counters *stress_current __attribute__((tls_model("local-exec")));

#endif
#endif
