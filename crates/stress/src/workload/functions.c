/*
 * The traced functions: a thousand small ones, each with five bytes of nops at its entry.
 *
 * Each counts its own calls, in the counters of the context that called it, and returns a value that depends on every one of its arguments
 * and on which function it is: a call that went astray, or whose arguments did not arrive, is found by its result. Some arguments come on the
 * stack at either width. On i386 half of the functions take the first three in registers (regparm), as Linux kernels and static functions
 * do; these are the registers that a trampoline has to keep there.
 *
 * The whole file is compiled without vector registers, so that those of the caller stay what they are.
 */
#include "workload.h"

__thread struct stress_counters *stress_current __attribute__((tls_model("local-exec")));

#ifdef __x86_64__
#define REGPARM
#else
#define REGPARM __attribute__((regparm(3)))
#endif

typedef unsigned long word;
typedef word plain_function(word, word, word, word, word, word, word, word);
typedef word regparm_function(word, word, word, word, word, word, word, word) REGPARM;

/* A traced function, and the way to call it. Probes have neither way: they keep every register, and registers.S calls them. */
struct stress_function {
    void *entry;
    plain_function *plain;
    regparm_function *in_registers;
};

/* The number of a function from its four digits. They may begin with zeros, which would make them octal. */
#define NUMBER(digits) (1##digits - 10000)

#define DEFINE(digits, attributes)                                                                                     \
    attributes __attribute__((noinline, patchable_function_entry(5))) word stress_fn_##digits(   \
        word a, word b, word c, word d, word e, word f, word g, word h)                                                \
    {                                                                                                                  \
        stress_current->own[NUMBER(digits)]++;                                                                         \
        word mixed = a;                                                                                                \
        mixed = mixed * 31 + b;                                                                                        \
        mixed = mixed * 31 + c;                                                                                        \
        mixed = mixed * 31 + d;                                                                                        \
        mixed = mixed * 31 + e;                                                                                        \
        mixed = mixed * 31 + f;                                                                                        \
        mixed = mixed * 31 + g;                                                                                        \
        mixed = mixed * 31 + h;                                                                                        \
        return mixed * 31 + NUMBER(digits);                                                                            \
    }
#define DEFINE_PLAIN(digits) DEFINE(digits, )
#define DEFINE_REGPARM(digits) DEFINE(digits, REGPARM)

#define LIST(digits, way) [NUMBER(digits)] = {.entry = (void *)stress_fn_##digits, .way = stress_fn_##digits},
#define LIST_PLAIN(digits) LIST(digits, plain)
#define LIST_REGPARM(digits) LIST(digits, in_registers)
#define LIST_PROBE(digits) [NUMBER(digits)] = {.entry = (void *)stress_fn_##digits},

/* P for functions that are called the platform's usual way, R for those with arguments in registers. */
#define FOUR(P, R, tens, w, x, y, z) P(tens##w) P(tens##x) R(tens##y) R(tens##z)
#define SIX(P, R, tens) FOUR(P, R, tens, 4, 5, 6, 7) P(tens##8) P(tens##9)
#define TEN(P, R, tens) FOUR(P, R, tens, 0, 1, 2, 3) SIX(P, R, tens)
#define NINETY(P, R, hundreds)                                                                                         \
    TEN(P, R, hundreds##1) TEN(P, R, hundreds##2) TEN(P, R, hundreds##3) TEN(P, R, hundreds##4) TEN(P, R, hundreds##5) \
    TEN(P, R, hundreds##6) TEN(P, R, hundreds##7) TEN(P, R, hundreds##8) TEN(P, R, hundreds##9)
#define HUNDRED(P, R, hundreds) TEN(P, R, hundreds##0) NINETY(P, R, hundreds)
#define EACH_FUNCTION(P, R)                                                                                            \
    SIX(P, R, 000) NINETY(P, R, 00) HUNDRED(P, R, 01) HUNDRED(P, R, 02) HUNDRED(P, R, 03) HUNDRED(P, R, 04)            \
    HUNDRED(P, R, 05) HUNDRED(P, R, 06) HUNDRED(P, R, 07) HUNDRED(P, R, 08) HUNDRED(P, R, 09) TEN(P, R, 100)           \
    TEN(P, R, 101) FOUR(P, R, 102, 0, 1, 2, 3)

/* Of registers.S. */
extern void stress_fn_0000(void);
extern void stress_fn_0001(void);
extern void stress_fn_0002(void);
extern void stress_fn_0003(void);

EACH_FUNCTION(DEFINE_PLAIN, DEFINE_REGPARM)

const struct stress_function stress_functions[STRESS_FUNCTIONS] = {
    LIST_PROBE(0000) LIST_PROBE(0001) LIST_PROBE(0002) LIST_PROBE(0003) EACH_FUNCTION(LIST_PLAIN, LIST_REGPARM)};

/* Calls a function that is no probe. */
word stress_call(unsigned index, const word arguments[STRESS_ARGUMENTS])
{
    const struct stress_function *function = &stress_functions[index];
    const word *a = arguments;
    if (function->in_registers)
        return function->in_registers(a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7]);
    return function->plain(a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7]);
}

/* Makes `counters` those of the running context, and returns the ones before. */
struct stress_counters *stress_enter(struct stress_counters *counters)
{
    struct stress_counters *outer = stress_current;
    stress_current = counters;
    return outer;
}

/* The layout as this side sees it. */
const uint32_t stress_layout[] = {
    STRESS_FUNCTIONS,
    STRESS_PROBES,
    STRESS_ARGUMENTS,
    STRESS_OPS,
    sizeof(struct stress_function),
    offsetof(struct stress_counters, behind_site),
    offsetof(struct stress_counters, stray),
    offsetof(struct stress_counters, seen),
    offsetof(struct stress_counters, own),
    sizeof(struct stress_counters),
    STRESS_FRAME_IP * sizeof(word),
    REGISTERS_VECTORS,
    REGISTERS_MASKS,
    REGISTERS_X87,
    REGISTERS_MXCSR,
    REGISTERS_X87_CONTROL,
    REGISTERS_FLAGS,
    REGISTERS_GENERAL,
};
