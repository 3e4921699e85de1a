// A program of C that loads a library of C++ on demand (the letter l in a line of input), and then is called by it with a function that throws (t). Each line is answered by
// one: a number, how many exceptions were caught, the version now, and 1.

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include "check.h"

#ifndef VERSION
#define VERSION 1
#endif

// The function that is patched: what is called throws through it.
TRACED int between(int (*thrower)(int), int x)
{
	return thrower(OPAQUE(x)) + VERSION * 10;
}

TRACED int version(void)
{
	return OPAQUE(1000) / 1000 * VERSION;
}

int main(int argc, char **argv)
{
	int (*attempt)(int (*)(int (*)(int), int)) = NULL;
	int caught = 0;

	// Whatever becomes of the check, this ends.
	alarm(300);
	puts("ready");
	fflush(stdout);
	for (int c; (c = getchar()) != EOF;) {
		if (c == 'l') {
			void *library = dlopen(argv[argc - 1], RTLD_NOW);

			EXPECT(library);
			attempt = (int (*)(int (*)(int (*)(int), int)))dlsym(library, "attempt");
			EXPECT(attempt);
		} else if (c == 't') {
			caught += attempt(between);
		} else if (c == '\n') {
			printf("0 %d %d 1\n", caught, version());
			fflush(stdout);
		}
	}
	return 0;
}
