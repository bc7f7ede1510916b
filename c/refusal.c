// SPDX-License-Identifier: BSD-2-Clause
#include "refusal.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

int qs_refuse(struct qs_refusal *refusal, const char *format, ...)
{
	va_list arguments;

	va_start(arguments, format);
	vsnprintf(refusal->why, sizeof(refusal->why), format, arguments);
	va_end(arguments);
	refusal->hint[0] = '\0';
	return -1;
}

void qs_hint(struct qs_refusal *refusal, const char *format, ...)
{
	va_list arguments;

	va_start(arguments, format);
	vsnprintf(refusal->hint, sizeof(refusal->hint), format, arguments);
	va_end(arguments);
}

static void qs_make_printable(char *text)
{
	for (; *text; text++)
		if (*text < ' ' || *text > '~')
			*text = '?';
}

void qs_refusal_print(int fd, const char *program, struct qs_refusal *refusal)
{
	char text[sizeof(*refusal) + 80];
	int length;

	qs_make_printable(refusal->why);
	qs_make_printable(refusal->hint);
	length =
		snprintf(text, sizeof(text), "%.64s: %s\n%s%s%s", program, refusal->why,
			 *refusal->hint ? "hint: " : "", refusal->hint, *refusal->hint ? "\n" : "");
	/* Where nobody listens there is nothing left to do. */
	if (write(fd, text, length) < 0)
		return;
}
