// SPDX-License-Identifier: BSD-2-Clause
/*
 * fuzz INPUTS SEED: command lines for what qsteer-qemu reads and changes, in this process.
 *
 * Each is made of a NIC or two as libvirt describes them, of other words, and of bytes changed in any of it; where none
 * is, what has to come out is known.  What is changed must be the same object with one more member.  A wrong answer
 * aborts, as the sanitizers do; an input that takes more than ten seconds ends in SIGALRM.
 */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "../fuzz.h"
#include "json.h"
#include "qemu_nics.h"

#define WORDS_MAX 16

/* Members of objects; the first of each list is what a NIC that gets a program has. */
static const char *const drivers[] = { "\"virtio-net-pci\"",
				       "\"virtio-net-ccw\"",
				       "\"virtio-net\"",
				       "\"virtio-net-device\"",
				       "\"e1000\"",
				       "\"virtio-net\\u002dpci\"",
				       "7",
				       "null",
				       "\"virtio-net-\\u0000\"" };
static const char *const switches[] = { "true",	    "\"on\"", "false",	"\"off\"",
					"\"auto\"", "1",      "[true]", "{}" };
static const char *const ids[] = { "\"net0\"", "\"}\"",	      "\"\\\"}\"", "\"\\ud800\"",
				   "\"\xff\"", "\"\\u001b\"", "[[[[]]]]",  "-1e999" };
static const char *const fds[] = { "\"33:34\"", "\"3\"",	  "\"x\"", "\"\"",
				   "\":\"",	"\"2147483648\"", "33",	   "\"-1\"" };
static const char *const more[] = { "",
				    ",\"mq\":true",
				    ",\"ebpf-rss-fds\":[\"1\"]",
				    ",\"rss\":false",
				    ",\"a\":{\"b\":[1,2]}",
				    ",\"rss\":true",
				    ",\"\\u0065bpf-rss-fds\":null",
				    ",\"a\":\"}\"" };
static const char *const vhosts[] = { "",
				      ",\"vhost\":true",
				      ",\"vhost\":false",
				      ",\"vhostfds\":\"4:5\"",
				      ",\"vhostfd\":\"4\"",
				      ",\"vhostforce\":true",
				      ",\"vhost\":\"on\"" };
static const int vhost_is_on[] = { 0, 1, 0, 1, 1, 1, 0 };
static const char *const ends[] = { "", "", "", " ", "\n\t", "}", "x", "{}" };
static const char *const others[] = { "-device",
				      "--device",
				      "-netdev",
				      "-",
				      "",
				      "--",
				      "virtio-net-pci,rss=on,netdev=n0,id=net7",
				      "virtio-net,rss=yes,,id=",
				      "virtio-net-pci,rss=",
				      ",id=,rss=on",
				      "{",
				      "{}",
				      "tap,id=n0,fds=3:4" };

static char *spoilt(const char *text, int times)
{
	static const char special[] = { '{', '}', '"', '\\', ',', ':',
					'[', ']', ' ', '\'', '/', (char)0xff };
	size_t length = strlen(text);
	char *copy = malloc(length + 1), *exact;

	memcpy(copy, text, length + 1);
	while (times-- && length) {
		size_t at = draw(length);

		if (!draw(3))
			copy[length = at] = '\0';
		else if (!draw(2))
			copy[at] = PICK(special);
		else
			copy[at] ^= 1 << draw(8);
		length = strlen(copy);
	}
	exact = strdup(copy); /* exactly as long: sanitizers see a byte too far */
	free(copy);
	return exact;
}

/* The pick from a list, and whether it is one of the first. */
static const char *pick(const char *const list[], size_t count, size_t right, int wild, int *proper)
{
	size_t which = draw(wild ? count : right);

	*proper &= which < right;
	return list[which];
}

/* The same object, and our member. */
static void check_change(const char *device)
{
	static const int numbers[QS_PROGRAM_FDS] = { 7, 0, 2147483647, 10 };
	char *changed = qs_nic_with_fds(device, numbers);
	qs_auto_json struct json_object *before = qs_json_object(device, strlen(device)),
					*after = NULL;
	struct json_object *given;

	check(changed != NULL, "no memory");
	after = qs_json_object(changed, strlen(changed));
	check(after && json_object_object_get_ex(after, "ebpf-rss-fds", &given), changed);
	check(!strcmp(json_object_to_json_string_ext(given, JSON_C_TO_STRING_PLAIN),
		      "[\"7\",\"0\",\"2147483647\",\"10\"]"),
	      changed);
	json_object_object_del(after, "ebpf-rss-fds");
	check(json_object_equal(before, after), changed);
	free(changed);
}

int main(int argc, char **argv)
{
	static struct qs_nics nics;
	unsigned long inputs, programs = 0, reasons = 0;

	check(argc == 3, "usage: fuzz INPUTS SEED");
	inputs = strtoul(argv[1], NULL, 10);
	state = strtoull(argv[2], NULL, 10) | 1;
	for (unsigned long i = 0; i < inputs; i++) {
		int proper = 1, wild = draw(2), spoil = wild && draw(2) ? (int)draw(4) : 0,
		    count = 1;
		size_t vhost = draw(COUNT(vhosts));
		char *words[WORDS_MAX] = { strdup("qemu") };
		char device[1024], netdev[1024];

		alarm(10);
		snprintf(device, sizeof(device),
			 "{\"driver\":%s,\"rss\":%s,\"netdev\":\"n0\",\"id\":%s%s}%s",
			 pick(drivers, COUNT(drivers), 4, wild, &proper),
			 pick(switches, COUNT(switches), 2, wild, &proper),
			 pick(ids, COUNT(ids), 3, wild, &proper),
			 pick(more, COUNT(more), 2, wild, &proper),
			 pick(ends, COUNT(ends), 5, wild, &proper));
		snprintf(netdev, sizeof(netdev), "{\"type\":\"tap\",\"fds\":%s,\"id\":\"n0\"%s}",
			 pick(fds, COUNT(fds), 2, wild, &proper), vhosts[vhost]);
		while (count < WORDS_MAX - 4 && wild && draw(3))
			words[count++] = spoilt(PICK(others), spoil);
		words[count++] = strdup(draw(2) ? "-device" : "--device");
		words[count++] = spoilt(device, spoil);
		words[count++] = strdup("-netdev");
		words[count++] = spoilt(netdev, spoil);
		qs_nics_read(count, words, &nics);
		if (proper && !wild) {
			check(nics.count == 1 && !nics.nic[0].why_not, device);
			check(nics.nic[0].vhost == vhost_is_on[vhost], netdev);
			check(nics.nic[0].queue_fd == 33 || nics.nic[0].queue_fd == 3, netdev);
		}
		for (int n = 0; n < nics.count; n++) {
			const struct qs_nic *nic = &nics.nic[n];

			check(nic->position > 1 && nic->position < count, "a position");
			check(nic->why_not || (nic->device && nic->queue_fd >= 0), "a verdict");
			if (!nic->why_not)
				check_change(words[nic->position]);
			*(nic->why_not ? &reasons : &programs) += 1;
		}
		qs_nics_free(&nics);
		while (count)
			free(words[--count]);
	}
	printf("%lu command lines: %lu NICs that get a program, %lu that do not\n", inputs,
	       programs, reasons);
	return 0;
}
