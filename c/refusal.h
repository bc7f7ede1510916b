/* SPDX-License-Identifier: BSD-2-Clause */
/* Why a program refuses: one line, and a hint that may be empty. */
#ifndef QS_REFUSAL_H
#define QS_REFUSAL_H

struct qs_refusal {
	char why[512];
	char hint[512];
};

/* Both cut what does not fit.  The first one also forgets a hint; it returns -1, for its caller to return. */
int qs_refuse(struct qs_refusal *refusal, const char *format, ...)
	__attribute__((format(printf, 2, 3)));
void qs_hint(struct qs_refusal *refusal, const char *format, ...)
	__attribute__((format(printf, 2, 3)));

/* Two lines at most on an fd, the first one with the program's name; what a terminal would act on is written as '?'. */
void qs_refusal_print(int fd, const char *program, struct qs_refusal *refusal);

#endif
