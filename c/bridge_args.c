// SPDX-License-Identifier: BSD-2-Clause
#include "bridge_args.h"

#include <limits.h>
#include <linux/if.h>
#include <string.h>

static const char usage[] = "usage: qsteer-bridge-helper [--use-vnet] --br=BRIDGE --fd=N";

/* What follows "--option=", or NULL if the word is another. */
static const char *qs_value(const char *word, const char *option)
{
	size_t length = strlen(option);

	return strncmp(word, option, length) ? NULL : word + length;
}

/* Digits alone, up to INT_MAX; -1 if it is anything else. */
static int qs_number(const char *text)
{
	long long number = 0;

	if (!*text)
		return -1;
	for (; *text; text++) {
		if (*text < '0' || *text > '9')
			return -1;
		number = number * 10 + (*text - '0');
		if (number > INT_MAX)
			return -1;
	}
	return number;
}

/*
 * The kernel cuts the name that an ioctl gets at a ':' and looks for the rest: "br0:1" is br0, and an access list that
 * denies br0 does not know.
 */
static int qs_check_name(const char *name, struct qs_refusal *refusal)
{
	if (!*name)
		return qs_refuse(refusal, "--br= names no bridge");
	if (strlen(name) >= IFNAMSIZ)
		return qs_refuse(refusal, "--br=%.*s...: a name has %d characters at most",
				 IFNAMSIZ, name, IFNAMSIZ - 1);
	if (!strcmp(name, ".") || !strcmp(name, ".."))
		return qs_refuse(refusal, "--br=%s: no network device has such a name", name);
	for (const unsigned char *at = (const unsigned char *)name; *at; at++)
		if (*at <= ' ' || *at == 0x7f || *at == '/' || *at == ':')
			return qs_refuse(refusal,
					 "--br=%s: a bridge's name is of printable"
					 " characters other than '/', ':' and blanks",
					 name);
	return 0;
}

static int qs_check_queues(const char *text, struct qs_refusal *refusal)
{
	if (qs_number(text) == 1)
		return 0;
	qs_refuse(refusal, "--queues=%.16s: QEMU gives a netdev with helper= one queue, always",
		  text);
	qs_hint(refusal, "for more: qsteer run, qsteer plug, or -netdev "
			 "tap,queues=N,script=qsteer-ifup");
	return -1;
}

int qs_bridge_args_parse(int count, char *const *words, struct qs_bridge_args *args,
			 struct qs_refusal *refusal)
{
	const char *fd = NULL, *queues = NULL;

	*args = (struct qs_bridge_args){ .task = QS_MAKE_TAP, .fd = -1 };
	for (int i = 1; i < count; i++) {
		const char *word = words[i], *value;
		bool repeated;

		if (!strcmp(word, "--help") || !strcmp(word, "--version")) {
			args->task = word[2] == 'h' ? QS_SAY_HELP : QS_SAY_VERSION;
			return 0;
		}
		if (!strcmp(word, "--use-vnet")) {
			repeated = args->vnet_header;
			args->vnet_header = true;
		} else if ((value = qs_value(word, "--br="))) {
			repeated = args->bridge;
			args->bridge = value;
		} else if ((value = qs_value(word, "--fd="))) {
			repeated = fd;
			fd = value;
		} else if ((value = qs_value(word, "--queues="))) {
			repeated = queues;
			queues = value;
		} else {
			qs_refuse(refusal, "%.64s is no option of this program", word);
			qs_hint(refusal, usage);
			return -1;
		}
		if (repeated)
			return qs_refuse(refusal, "%.64s: this option was given before", word);
	}
	if (queues && qs_check_queues(queues, refusal))
		return -1;
	if (!args->bridge || !fd) {
		qs_refuse(refusal, "%s is missing", args->bridge ? "--fd=N" : "--br=BRIDGE");
		qs_hint(refusal, usage);
		return -1;
	}
	if (qs_check_name(args->bridge, refusal))
		return -1;
	args->fd = qs_number(fd);
	if (args->fd < 0)
		return qs_refuse(refusal, "--fd=%.64s is no file descriptor", fd);
	return 0;
}
