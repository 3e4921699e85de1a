// Drives the functions of hostile.S.
#include "check.h"
#include <stdint.h>
#include <string.h>

long self_loop(long count, long from);
long into_prologue(long count, long from);
long table_call(long value, long which);
long table_switch(long which);
long carries(void);
long seen_flags(long flags);
void short_one(void);
int short_two(int value);
int short_three(int value);
char *where_from(void);
long pops_first(long value);
long call_next(void);
long loops(long count);
long jrcxz_first(long value);
long keeps_everything(void *in, void *out);
void keeps_upper_halves(void *in, void *out);
extern char main_begin[];

enum { ROUNDS = 2000 };

TRACED long is_here(void) {
    char *from = where_from();
    return from > (char *)is_here && from < (char *)is_here + 200;
}

int main(void) {
    unsigned char in[1024], out[1024];
    long sum = 0;
    for (int round = 0; round < ROUNDS; round++) {
        EXPECT(self_loop(10, 5) == 15);
        EXPECT(into_prologue(10, 5) == 15);
        EXPECT(table_call(7, 0) == 14 && table_call(8, 1) == 16);
        sum += table_switch(0) + table_switch(1) + table_switch(2) + table_switch(3);
        EXPECT(carries() == 8 + 7 + 1);
        short_one();
        EXPECT(short_two(5) == 5 && short_three(5) == 6);
        EXPECT(is_here());
        EXPECT(pops_first(4) == 7);
        EXPECT(call_next() == 0);
        EXPECT(loops(6) == 6);
        EXPECT(jrcxz_first(0) == 2 && jrcxz_first(9) == 1);
    }
    // Carry, parity, adjust, zero, sign, direction, overflow.
    for (int bits = 0; bits < 128; bits++) {
        static const long places[] = {0, 2, 4, 6, 7, 10, 11};
        long flags = 0;
        for (int bit = 0; bit < 7; bit++) flags |= (bits >> bit & 1L) << places[bit];
        EXPECT(seen_flags(flags | 0x202) == flags);
    }
    for (int round = 0; round < 10000; round++) {
        for (size_t byte = 0; byte < sizeof in; byte++) in[byte] = (unsigned char)(byte * 7 + round);
        // A normal number of extended precision: 1.5 and something.
        memcpy(in + 112, &(long double){1.5L + round}, 10);
        memset(out, 0, sizeof out);
        memcpy(out, in, 384);
        EXPECT(keeps_everything(in, out) == 1);
        EXPECT(memcmp(in, out, 384) == 0);
        if (__builtin_cpu_supports("avx")) {
            keeps_upper_halves(in, out);
            EXPECT(memcmp(in, out, sizeof(long) == 8 ? 512 : 256) == 0);
        }
    }
    printf("sum %ld\n", sum);
    printf("traced calls self_loop %d\n", ROUNDS * 10);
    tell_calls("is_here", ROUNDS);
    return 0;
}
