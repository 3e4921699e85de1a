// No address space left for anybody: traced calls go on, to depths that were never reached before.
#include "check.h"
#include <sys/mman.h>
#include <sys/resource.h>

TRACED long deeper(long depth) { return depth == 0 ? 0 : OPAQUE(deeper(depth - 1)) + 1; }

int main(void) {
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
