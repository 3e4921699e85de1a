// A library that throws an exception through a function that it is given, and catches it behind.

#include "check.h"

static int thrower(int x)
{
	if (OPAQUE(x) == 7)
		throw x;
	return x;
}

extern "C" int attempt(int (*between)(int (*)(int), int))
{
	try {
		return between(thrower, 7) - 1000;
	} catch (int thrown) {
		return thrown == 7;
	}
}
