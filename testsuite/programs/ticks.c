// Calls `tick` many times, and notes in a file that it has mapped how far it is, so that whoever kills it knows: a word for the calls that were begun, one
// for those that returned, and then for every 64th call the time-stamp counter when it had returned. Ends with status 7.
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <sys/mman.h>
#include <unistd.h>

#include "check.h"

enum { CALLS = 800000, STRIDE = 64 };

struct notes {
    volatile uint64_t begun, done;
    volatile uint64_t returned_at[CALLS / STRIDE];
};

__attribute__((noinline)) unsigned tick(unsigned x) {
    return x * 2654435761u + 1;
}

// Nothing before it is executed later.
static inline uint64_t tsc(void) {
    uint32_t low, high;
    __asm__ volatile("lfence\n\trdtsc" : "=a"(low), "=d"(high) : : "memory");
    return (uint64_t)high << 32 | low;
}

int main(int argc, char **argv) {
    EXPECT(argc == 2);
    int file = open(argv[1], O_RDWR | O_CREAT, 0600);
    EXPECT(file >= 0 && ftruncate(file, sizeof(struct notes)) == 0);
    struct notes *notes = mmap(NULL, sizeof *notes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    EXPECT(notes != MAP_FAILED);
    unsigned x = 0;
    for (int call = 0; call < CALLS; call++) {
        notes->begun++;
        x = tick(x);
        notes->done++;
        if (call % STRIDE == 0)
            notes->returned_at[call / STRIDE] = tsc();
    }
    printf("ticked to %u\n", x);
    return 7;
}
