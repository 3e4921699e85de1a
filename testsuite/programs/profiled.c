// For a profiler that is compiled in: functions with several callers, by name and by pointer, deep and left by longjmp. Nothing is called by a jump.
#include "check.h"
#include <setjmp.h>

static long leaves;
static jmp_buf home;

TRACED long leaf(long value) {
    leaves++;
    return value * 3 + 1;
}
TRACED long left(long value) { return leaf(value) + 1; }
TRACED long right(long value) { return leaf(value) + leaf(value + 1); }

TRACED long deep(long depth) {
    if (depth == 0) return leaf(depth) + 2;
    long below = deep(depth - 1);
    return OPAQUE(below) + 1;
}

TRACED void thrown(long depth) {
    if (depth == 0) longjmp(home, 1);
    thrown(depth - 1);
    leaves++;
}
static void throw_often(void) {
    for (volatile int turn = 0; turn < 3; turn++)
        if (!setjmp(home)) thrown(10);
}

TRACED int compare(const void *one, const void *other) { return *(const int *)one - *(const int *)other; }

static long (*volatile pointer)(long) = left;

int main(void) {
    long sum = 0;
    int numbers[] = {5, 3, 9, 1, 7, 2};
    for (long value = 0; value < 500; value++) sum += left(value) + right(value) + pointer(value);
    sum += deep(40);
    throw_often();
    qsort(numbers, sizeof numbers / sizeof *numbers, sizeof *numbers, compare);
    printf("sum %ld, %d first\n", sum, numbers[0]);
    tell_calls("leaf", leaves);
    tell_calls("left", 1000);
    tell_calls("right", 500);
    tell_calls("deep", 41);
    tell_calls("thrown", 33);
    return 0;
}
