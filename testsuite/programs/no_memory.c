// No address space left for anybody: traced calls go on, to depths that were never reached before.
#include "check.h"
#include <stdint.h>
#include <sys/mman.h>
#include <sys/resource.h>

TRACED long deeper(long depth) { return depth == 0 ? 0 : OPAQUE(deeper(depth - 1)) + 1; }

// Shadows are mapped by blocks of the stack, whichever a stack begins in.
#ifdef __i386__
#define BLOCK_BITS 16
#define NEEDED_BYTES (60 << 10)
#else
#define BLOCK_BITS 20
#define NEEDED_BYTES (128 << 10)
#endif

// Has the kernel make the stack as large as is needed.
static __attribute__((noinline)) void reach(void) {
    *(volatile char *)__builtin_alloca(NEEDED_BYTES) = 0;
}

int main(void) {
    uintptr_t here = (uintptr_t)__builtin_frame_address(0);
    // No other block begins in what is needed below.
    if (here >> BLOCK_BITS != (here - NEEDED_BYTES) >> BLOCK_BITS)
        *(volatile char *)__builtin_alloca((here & ((1 << BLOCK_BITS) - 1)) + 64) = 0;
    reach();
    printf("before %ld\n", deeper(10));
    struct rlimit none = {1 << 20, 1 << 20};
    EXPECT(setrlimit(RLIMIT_AS, &none) == 0);
    EXPECT(mmap(0, 1 << 20, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0) == MAP_FAILED);
    // Within the stack that is there already.
    printf("after %ld\n", deeper(500));
    long sum = 0;
    for (int round = 0; round < 500; round++) sum += deeper(100);
    printf("sum %ld\n", sum);
    tell_calls("deeper", 11 + 501 + 500 * 101);
    return 0;
}
