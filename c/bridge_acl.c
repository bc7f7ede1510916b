// SPDX-License-Identifier: BSD-2-Clause
/*
 * Theory of operation
 *
 * One rule a line: "allow BRIDGE", "deny BRIDGE", "allow all", "deny all", "include FILE", or a comment that begins with
 * '#'.  Nothing is allowed by default, one deny beats every allow, wherever they are.  What is asked is one bridge, so
 * nothing is kept of the rules but whether one allowed it and one denied it.
 *
 * How lines are read is QEMU's own helper's way, as observed, to the letter: blanks are those of the C locale but the
 * vertical tab; a word ends at the line's first space, or at its first tab if it has no space; what is left is the
 * name, blanks inside included; a name that is too long and a line that is no rule make the whole list void.  An include
 * that is not there, or that the caller may not read, is none: so files with rules for one group each work.
 *
 * Where the other helper would go on without having read a deny, or read what its caller wrote, this one refuses:
 * - an included file with an error in it (the other one forgets the rest of that file);
 * - an include by a relative path (the other one looks in the directory that its caller stands in);
 * - an include that cannot be opened for other reasons than those above, such as too few file descriptors: the caller
 *   sets that limit;
 * - what is no regular file (the other one waits at a FIFO, takes a directory and /dev/null for empty);
 * - a line of more than 4095 bytes (the other one takes the rest for a line of its own), a line with a NUL;
 * - includes that nest deeper than 16, or 100,000 lines (the other one crashes on a file that includes itself);
 * - a file that belongs to the caller, or that the caller can write, unless that is root.
 */
#define _GNU_SOURCE
#include "bridge_acl.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/if.h>
#include <stdbool.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "auto.h"

#define QS_LINE 4095 /* bytes, the newline included */
#define QS_DEPTH 16
#define QS_BUDGET 100000 /* lines and files */

static const char blanks[] = " \f\n\r\t";

struct qs_acl {
	const char *bridge;
	struct qs_refusal *refusal;
	bool allowed;
	bool denied;
	unsigned depth;
	unsigned budget;
};

struct qs_lines {
	int fd;
	size_t begin, end; /* of what is read and not handed out yet */
	bool at_end;
	char bytes[QS_LINE + 2]; /* one more than a line tells that it is too long; a NUL */
};

/* Of the files that are open, one inside the other.  Not on the stack, whose limit is the caller's. */
static struct qs_lines qs_open_lists[QS_DEPTH];

/* The next line, its newline replaced by a NUL.  1; 0 after the last one; -errno, -E2BIG if it is too long. */
static int qs_next_line(struct qs_lines *lines, char **line, size_t *length)
{
	for (;;) {
		char *first = lines->bytes + lines->begin;
		size_t waiting = lines->end - lines->begin;
		char *newline = memchr(first, '\n', waiting);
		size_t size = newline ? (size_t)(newline - first) + 1 : waiting;
		ssize_t count;

		if (size > QS_LINE)
			return -E2BIG;
		if (newline || (lines->at_end && waiting)) {
			*line = first;
			*length = newline ? size - 1 : size;
			first[*length] = '\0';
			lines->begin += size;
			return 1;
		}
		if (lines->at_end)
			return 0;
		memmove(lines->bytes, first, waiting);
		lines->begin = 0;
		lines->end = waiting;
		count = read(lines->fd, lines->bytes + waiting, QS_LINE + 1 - waiting);
		if (count < 0)
			return -errno;
		lines->end += count;
		lines->at_end = count == 0;
	}
}

/* Whoever may change a list may use every bridge: then there is none. */
static bool qs_callers_own(int fd, const struct stat *status)
{
	uid_t caller = getuid();

	if (caller == 0)
		return false;
	if (status->st_uid == caller || !syscall(SYS_faccessat2, fd, "", W_OK, AT_EMPTY_PATH))
		return true;
	/* Any other answer does not say that the caller may not. */
	return errno != EACCES && errno != EROFS && errno != EPERM;
}

static int qs_read_list(struct qs_acl *acl, int fd, const char *path);

static int qs_include(struct qs_acl *acl, const char *path, const char *from, unsigned number)
{
	qs_auto_close int fd = -1;

	if (*path != '/')
		return qs_refuse(acl->refusal, "%s:%u: \"include %s\" is not by an absolute path",
				 from, number, path);
	fd = open(path, O_RDONLY | O_CLOEXEC | O_NOCTTY | O_NONBLOCK);
	if (fd < 0 && (errno == ENOENT || errno == ENOTDIR || errno == EACCES))
		return 0;
	if (fd < 0)
		return qs_refuse(acl->refusal, "%s:%u: cannot read %s: %s", from, number, path,
				 strerror(errno));
	return qs_read_list(acl, fd, path);
}

static int qs_rule(struct qs_acl *acl, char *line, const char *path, unsigned number)
{
	char *word = line + strspn(line, blanks);
	char *name, *end;
	bool matches;

	if (!*word || *word == '#')
		return 0;
	name = strchr(word, ' ');
	if (!name)
		name = strchr(word, '\t');
	if (!name)
		return qs_refuse(acl->refusal, "%s:%u: this is no rule", path, number);
	*name++ = '\0';
	name += strspn(name, blanks);
	for (end = name + strlen(name); end > name && strchr(blanks, end[-1]); end--)
		end[-1] = '\0';

	if (!strcmp(word, "include"))
		return qs_include(acl, name, path, number);
	if (strcmp(word, "allow") && strcmp(word, "deny"))
		return qs_refuse(acl->refusal, "%s:%u: this is no rule", path, number);
	if (strlen(name) >= IFNAMSIZ)
		return qs_refuse(acl->refusal, "%s:%u: a bridge's name has %d characters at most",
				 path, number, IFNAMSIZ - 1);
	matches = !strcmp(name, "all") || !strcmp(name, acl->bridge);
	acl->allowed |= matches && *word == 'a';
	acl->denied |= matches && *word == 'd';
	return 0;
}

static int qs_read_lines(struct qs_acl *acl, struct qs_lines *lines, const char *path)
{
	char *line = NULL;
	size_t length = 0;
	int err;

	for (unsigned number = 1; (err = qs_next_line(lines, &line, &length)); number++) {
		if (err == -E2BIG)
			return qs_refuse(acl->refusal, "%s:%u: a line has %d bytes at most", path,
					 number, QS_LINE);
		if (err < 0)
			return qs_refuse(acl->refusal, "cannot read %s: %s", path, strerror(-err));
		if (memchr(line, '\0', length))
			return qs_refuse(acl->refusal, "%s:%u: there is a NUL", path, number);
		if (!acl->budget--)
			return qs_refuse(acl->refusal, "%s: more than %d lines with its includes",
					 path, QS_BUDGET);
		if (qs_rule(acl, line, path, number))
			return -1;
	}
	return 0;
}

static int qs_read_list(struct qs_acl *acl, int fd, const char *path)
{
	struct qs_lines *lines;
	struct stat status;
	int result;

	if (fstat(fd, &status))
		return qs_refuse(acl->refusal, "cannot look at %s: %s", path, strerror(errno));
	if (!S_ISREG(status.st_mode))
		return qs_refuse(acl->refusal, "%s is no regular file", path);
	if (qs_callers_own(fd, &status)) {
		qs_refuse(acl->refusal, "%s can be changed by its reader, and allows nothing",
			  path);
		qs_hint(acl->refusal, "it should be root's, and nobody else's to write: "
				      "chown root and chmod go-w");
		return -1;
	}
	if (acl->depth == QS_DEPTH || !acl->budget--)
		return qs_refuse(acl->refusal, "%s: includes nest deeper than %d, or are too many",
				 path, QS_DEPTH);
	lines = &qs_open_lists[acl->depth++];
	lines->fd = fd;
	lines->begin = lines->end = 0;
	lines->at_end = false;
	result = qs_read_lines(acl, lines, path);
	acl->depth--;
	return result;
}

int qs_bridge_acl_check(const char *path, const char *bridge, struct qs_refusal *refusal)
{
	struct qs_acl acl = { .bridge = bridge, .refusal = refusal, .budget = QS_BUDGET };
	qs_auto_close int fd = open(path, O_RDONLY | O_CLOEXEC | O_NOCTTY | O_NONBLOCK);

	if (fd < 0) {
		qs_refuse(refusal, "cannot read %s: %s", path, strerror(errno));
		qs_hint(refusal,
			"the administrator lists there which bridges may be used: allow %s",
			bridge);
		return -1;
	}
	if (qs_read_list(&acl, fd, path))
		return -1;
	if (acl.denied)
		return qs_refuse(refusal, "%s denies bridge %s", path, bridge);
	if (!acl.allowed) {
		qs_refuse(refusal, "%s does not allow bridge %s", path, bridge);
		qs_hint(refusal, "the administrator allows it there with a line: allow %s", bridge);
		return -1;
	}
	return 0;
}
