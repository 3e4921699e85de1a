/* Mends a function of a running program, and takes that back. A callback that counts its calls sees them all the while.
 * `-fno-ipa-ra` is for GCC: callers must not know which registers the function that is replaced leaves alone.
 *
 *     cc -O2 -fpatchable-function-entry=5 -fno-ipa-ra replace.c -o replace $(pkg-config --cflags --libs trapline)
 */

#include "check.h"

/* Has a defect: it leaves out the last element. */
__attribute__((noinline)) int sum(const int *values, int count) {
    __asm__ volatile("" : "+r"(values));
    int sum = 0;
    for (int i = 0; i < count - 1; i++)
        sum += values[i];
    return sum;
}

static int right_sum(const int *values, int count) {
    int sum = 0;
    for (int i = 0; i < count; i++)
        sum += values[i];
    return sum;
}

static void count(trapline_call *call, void *calls) {
    (void)call;
    ++*(int *)calls;
}

int main(void) {
    static const int values[] = {1, 2, 39};
    static int calls;
    trapline_tracer *tracer;
    trapline_ops *counting, *fix;
    check(trapline_start(&tracer));
    check(trapline_attach(tracer, "sum", 0, count, &calls, &counting));

    int before = sum(values, 3);
    check(trapline_replace(tracer, "sum", (trapline_function)right_sum, &fix));
    int during = sum(values, 3);
    trapline_detach(fix);
    int after = sum(values, 3);

    trapline_detach(counting);
    trapline_stop(tracer);
    printf("before %d, mended %d, as built %d, %d calls\n", before, during, after, calls);
    return before == 3 && during == 42 && after == 3 && calls == 3 ? EXIT_SUCCESS : EXIT_FAILURE;
}
