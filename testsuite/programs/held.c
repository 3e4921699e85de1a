// A thread that never sleeps, and has values in registers of vectors and of the x87 nearly all the time. Each line of input is answered by one, as in pair.c: how often it
// has looked, how often they were lost, which version is there now, and 1.

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include "check.h"

#ifndef VERSION
#define VERSION 1
#endif

#define ALL_OF_X87 "st", "st(1)", "st(2)", "st(3)", "st(4)", "st(5)", "st(6)", "st(7)"

__attribute__((noipa)) int version(int x)
{
	return OPAQUE(x * 1000) / 1000 + VERSION;
}

#ifdef CALLBACKS

// Uses all registers that a function may, and finds them as a function may expect them.
static int uses(void)
{
	unsigned short status;

	__asm__ volatile("pcmpeqd %%xmm7, %%xmm7\n\t"
			 "fld1\n\tfld1\n\tfld1\n\tfld1\n\tfld1\n\tfld1\n\tfld1\n\tfld1\n\t"
			 "fnstsw %0\n\t"
			 "fninit"
			 : "=a"(status)
			 :
			 : "xmm7", ALL_OF_X87);
	// A register was not free.
	return status & 0x40 ? 9 : 0;
}

int trapline_pre_apply(void)
{
	return uses();
}

int trapline_post_revert(void)
{
	return uses();
}

#endif

static int are_kept(void)
{
	unsigned long left = OPAQUE(100000);
	unsigned held = OPAQUE(0x5eed1234), found;
	double pi;

	__asm__ volatile("movd %[held], %%xmm7\n\t"
			 "fldpi\n"
			 "2:\tdec %[left]\n\t"
			 "jnz 2b\n\t"
			 "movd %%xmm7, %[found]\n\t"
			 "fstpl %[pi]"
			 : [left] "+r"(left), [found] "=&r"(found), [pi] "=m"(pi)
			 : [held] "r"(held)
			 : "xmm7", ALL_OF_X87, "cc");
	return found == held && pi > 3.14159 && pi < 3.1416;
}

int main(void)
{
	unsigned long calls = 0, lost = 0;

	// Whatever becomes of the check, this ends.
	alarm(300);
	fcntl(0, F_SETFL, O_NONBLOCK);
	puts("ready");
	fflush(stdout);
	for (char c = 0; read(0, &c, 1) != 0; calls++) {
		if (c == '\n') {
			printf("%lu %lu %d 1\n", calls, lost, version(0));
			fflush(stdout);
		}
		c = 0;
		for (int i = 0; i < 20; i++)
			lost += !are_kept();
	}
	return 0;
}
