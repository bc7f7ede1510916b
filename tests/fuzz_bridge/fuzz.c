// SPDX-License-Identifier: BSD-2-Clause
/*
 * fuzz INPUTS SEED FOLDER: command lines and access lists for the bridge helper's own parsers, in this process.
 *
 * Half of the inputs are command lines, half are lists in FOLDER that include one another.  They are made of what the
 * parsers look for, and then mutated; where they are not, what has to come out is known.  A wrong answer aborts, as the
 * sanitizers do; an input that takes more than ten seconds ends in SIGALRM.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "../fuzz.h"
#include "bridge_acl.h"
#include "bridge_args.h"

static const char *folder;

struct text {
	char bytes[1 << 16];
	size_t length;
};

static void append(struct text *text, const char *bytes, size_t length)
{
	if (length > sizeof(text->bytes) - text->length)
		length = sizeof(text->bytes) - text->length;
	memcpy(text->bytes + text->length, bytes, length);
	text->length += length;
}

static void append_string(struct text *text, const char *string)
{
	append(text, string, strlen(string));
}

static void append_many(struct text *text, char byte, size_t count)
{
	while (count--)
		append(text, &byte, 1);
}

/* Bytes changed, taken out, put in, doubled. */
static void mutate(struct text *text, size_t times)
{
	static const char special[] = { 0,    '\n', '\r', '\t',	      ' ', '\v',
					'\f', '#',  '=',  (char)0xff, 'a' };

	while (times-- && text->length) {
		char *at = text->bytes + draw(text->length);
		size_t rest = text->bytes + text->length - at;

		switch (draw(5)) {
		case 0:
			*at ^= 1 << draw(8);
			break;
		case 1:
			*at = PICK(special);
			break;
		case 2:
			memmove(at, at + 1, rest - 1);
			text->length--;
			break;
		case 3:
			append(text, at, draw(rest) + 1);
			break;
		case 4:
			text->length -= draw(rest);
			break;
		}
	}
}

/* Command lines */

static const char *const options[] = { "--br=",	     "--br=",	  "--fd=",    "--fd=", "--use-vnet",
				       "--queues=",  "--queues=", "--help",   "--brx", "-",
				       "--version=", "",	  "--use-vn", "br0",   "--fd" };
static const char *const values[] = { "br0",
				      "br1",
				      "3",
				      "0",
				      "1",
				      "-1",
				      "2147483647",
				      "2147483648",
				      "99999999999999999999999",
				      "03",
				      "0x3",
				      " 3",
				      "+3",
				      "",
				      ".",
				      "..",
				      "a/b",
				      "/",
				      "br0:1",
				      "fifteen-letters",
				      "sixteen-letters-",
				      "%s%n%d",
				      "tap%d",
				      "br\t0",
				      "\xc3\xa9",
				      "\x1b[2J" };

static void check_args(const struct qs_bridge_args *args)
{
	if (args->task != QS_MAKE_TAP)
		return;
	check(args->fd >= 0, "a negative fd");
	check(*args->bridge && strlen(args->bridge) < 16, "a name of no length");
	check(!strpbrk(args->bridge, "/: \t\n"), "a name that no device has");
}

/* What QEMU gives, in any order, every third time; else anything. */
static void any_word(struct text *text, int number, int proper)
{
	static const char *const qemus[] = { "--br=", "--fd=", "--use-vnet" };

	text->length = 0;
	append_string(text, proper ? qemus[number % COUNT(qemus)] : PICK(options));
	if (!proper && !draw(8))
		append_many(text, 'x', draw(9000));
	else if (!proper || number % COUNT(qemus) != 2)
		append_string(text, PICK(values));
	if (!draw(proper ? 16 : 4))
		mutate(text, draw(4));
}

static int fuzz_args(void)
{
	static struct text text;
	char *words[12];
	struct qs_bridge_args args;
	struct qs_refusal refusal;
	int proper = !draw(3), first = draw(3), result;
	int count = proper ? 3 + draw(2) : draw(COUNT(words));

	for (int i = 0; i < count; i++) {
		any_word(&text, first + i, proper);
		words[i] =
			strndup(text.bytes,
				text.length); /* exactly as long: sanitizers see a byte too far */
	}
	result = qs_bridge_args_parse(count, words, &args, &refusal);
	if (!result)
		check_args(&args);
	else
		check(*refusal.why && strlen(refusal.why) < sizeof(refusal.why), "no reason");
	for (int i = 0; i < count; i++)
		free(words[i]);
	return !result;
}

/* Lists */

static const char *const names[] = { "br0", "br1", "all", "fifteen-letters", "allow", "include" };
static const char *const seldom[] = { "sixteen-letters-", "", "br0 br1", "br\v0", "/", "\xc3\xa9" };
static const char *const words_of_rules[] = {
	"allow", "allow", "deny", "include", "ALLOW", "x", ""
};
static const char *const before[] = { "", "", " ", "\t", "\r", "\f \t", "\n", "# comment\n" };
static const char *const between[] = { " ", "  ", " \t", "\t", "\t\t" };
static const char *const after[] = { "\n", " \n", "\r\n", "\t\n", " \t\f\r\n" };
static const char *const files[] = {
	"/main", "/a", "/b", "/c", "/fifo", "/missing", "", "/closed"
};

/* Rules that are well formed, of the asked bridge br0 or not; what they say is added to *allowed and *denied. */
static void well_formed(struct text *list, int *allowed, int *denied)
{
	for (size_t rules = draw(6); rules--;) {
		int allow = draw(3) != 0;
		const char *name = PICK(names), *blank = PICK(between);

		append_string(list, PICK(before));
		append_string(list, allow ? "allow" : "deny");
		append_string(list, blank);
		append_string(list, name);
		/* After a tab, a space further on would make the first word longer. */
		append_string(list, strchr(blank, ' ') ? PICK(after) : "\r\n");
		if (!strcmp(name, "br0") || !strcmp(name, "all"))
			*(allow ? allowed : denied) = 1;
	}
}

static void any_rules(struct text *list)
{
	for (size_t rules = draw(8); rules--;) {
		const char *word = PICK(words_of_rules);

		append_string(list, PICK(before));
		append_string(list, word);
		append_string(list, PICK(between));
		if (!strcmp(word, "include")) {
			append_string(list, draw(8) ? folder : "");
			append_string(list, PICK(files));
		} else {
			append_string(list, draw(8) ? PICK(names) : PICK(seldom));
		}
		if (!draw(16))
			append_many(list, draw(2) ? ' ' : 'x', 4060 + draw(60));
		append_string(list, draw(32) ? PICK(after) : "");
	}
	mutate(list, draw(3) ? 0 : draw(12));
}

static void store(const char *name, const struct text *text)
{
	char path[4096];
	int fd;

	snprintf(path, sizeof(path), "%s%s", folder, name);
	fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
	check(fd >= 0 && write(fd, text->bytes, text->length) == (ssize_t)text->length, "no file");
	close(fd);
}

static int fuzz_list(void)
{
	static struct text list;
	struct qs_refusal refusal;
	char path[4096];
	int allowed = 0, denied = 0, plain = !draw(4), result;

	memset(&list, 0, sizeof(list));
	snprintf(path, sizeof(path), "%s/main", folder);
	if (plain) {
		well_formed(&list, &allowed, &denied);
	} else {
		any_rules(&list);
		if (!draw(4)) {
			store(files[1 + draw(3)], &list);
			list.length = 0;
			any_rules(&list);
		}
	}
	store("/main", &list);
	result = qs_bridge_acl_check(path, "br0", &refusal);
	if (plain)
		check((result == 0) == (allowed && !denied), list.bytes);
	if (result)
		check(*refusal.why && strlen(refusal.why) < sizeof(refusal.why), "no reason");
	return !result;
}

static int open_fds(void)
{
	DIR *listing = opendir("/proc/self/fd");
	int count = 0;

	check(listing != NULL, "/proc");
	while (readdir(listing))
		count++;
	closedir(listing);
	return count;
}

static void prepare(void)
{
	static const struct text empty;
	char path[4096];

	for (size_t i = 0; i < 4; i++)
		store(files[i], &empty);
	snprintf(path, sizeof(path), "%s/fifo", folder);
	check(mkfifo(path, 0644) == 0, "no FIFO");
}

int main(int argc, char **argv)
{
	unsigned long inputs, taken[2] = { 0 };
	int before_fds, after_fds;

	check(argc == 4, "usage: fuzz INPUTS SEED FOLDER");
	inputs = strtoul(argv[1], NULL, 10);
	state = strtoull(argv[2], NULL, 10) | 1;
	folder = argv[3];
	prepare();
	before_fds = open_fds();
	for (unsigned long i = 0; i < inputs; i++) {
		alarm(10);
		taken[i % 2] += i % 2 ? fuzz_list() : fuzz_args();
	}
	after_fds = open_fds();
	printf("%lu command lines, %lu taken; %lu lists, %lu of them allow; fds %d before, %d after\n",
	       (inputs + 1) / 2, taken[0], inputs / 2, taken[1], before_fds, after_fds);
	return before_fds != after_fds;
}
