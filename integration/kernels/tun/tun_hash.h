/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Hashes of packets as a virtio network device has them (virtio 1.2, 5.1.6.4.3), for tun.
 *
 * Theory of operation
 *
 * User space hands a device its state with an ioctl; which one, and how the state is laid out,
 * differs from one generation of the interface to the next.  TUN_HASH_GENERATION says which one
 * this module has, and the generation's header provides
 *
 *   TUN_HASH_STATE	the type of the state, and
 *   TUN_HASH_MEMBER	the name of its pointer in struct tun_struct; NULL is off;
 *   tun_hash_get()	answers what there is, on any fd; -ENOIOCTLCMD: not one of its requests;
 *   tun_hash_is_set()	whether a request changes the state of a device;
 *   tun_hash_copy()	the state out of user memory, NULL for off, or an error;
 *   tun_hash_look()	what a state means, as a struct tun_hash_view;
 *   TUN_HASH_OR_EBPF, TUN_HASH_REPORT_TAKES_HEADER, TUN_HASH_EBPF_FALLBACK: see tun_hash_ops.h.
 *
 * None of it knows struct tun_struct.  What does is in tun_hash_ops.h, and is the same for all.
 */
#ifndef TUN_HASH_H
#define TUN_HASH_H

#include <linux/bitops.h>
#include <linux/skbuff.h>
#include <linux/slab.h>
#include <linux/uaccess.h>
#include <linux/virtio_net.h>
#include <net/flow_dissector.h>

#define TUN_HASH_TYPES                                                    \
	(VIRTIO_NET_RSS_HASH_TYPE_IPv4 | VIRTIO_NET_RSS_HASH_TYPE_TCPv4 | \
	 VIRTIO_NET_RSS_HASH_TYPE_UDPv4 | VIRTIO_NET_RSS_HASH_TYPE_IPv6 | \
	 VIRTIO_NET_RSS_HASH_TYPE_TCPv6 | VIRTIO_NET_RSS_HASH_TYPE_UDPv6)

/* A key has ten words of 32 bits; the generations' structures have room for as many as bytes. */
#define TUN_HASH_KEY_ROOM 40

/* A state has them as the machine's, but in generation 4 as they came, until a packet is hashed. */
#if TUN_HASH_GENERATION == 4
#define TUN_HASH_KEY_WORD __be32
#define TUN_HASH_KEY_STORE(be32) (be32)
#define TUN_HASH_KEY_LOAD(word) be32_to_cpu(word)
#else
#define TUN_HASH_KEY_WORD u32
#define TUN_HASH_KEY_STORE(be32) be32_to_cpu(be32)
#define TUN_HASH_KEY_LOAD(word) (word)
#endif

/* Both addresses of IPv6 and both ports. */
#define TUN_HASH_INPUT_WORDS 9

/* What a state means; key and table are the state's own, and there only with rss. */
struct tun_hash_view {
	bool report;
	bool rss;
	bool drops; /* nothing goes to user space */
	u32 types;
	u16 mask;
	u16 unclassified;
	const TUN_HASH_KEY_WORD *key;
	const u16 *table;
};

/* What of a packet is hashed: no words, and VIRTIO_NET_HASH_REPORT_NONE, if nothing is. */
struct tun_hash_input {
	u16 report;
	u8 words;
	__be32 word[TUN_HASH_INPUT_WORDS];
};

/* The most specific one of the types that fits the packet; a fragment has addresses only. */
static void tun_hash_parse(const struct sk_buff *skb, u32 types, struct tun_hash_input *input)
{
	bool tcp = false, udp = false;
	struct flow_keys keys;

	input->report = VIRTIO_NET_HASH_REPORT_NONE;
	input->words = 0;
	if (!skb_flow_dissect_flow_keys(skb, &keys, FLOW_DISSECTOR_F_STOP_AT_ENCAP))
		return;

	if (!(keys.control.flags & FLOW_DIS_IS_FRAGMENT)) {
		tcp = keys.basic.ip_proto == IPPROTO_TCP;
		udp = keys.basic.ip_proto == IPPROTO_UDP;
	}

	/* Not basic.n_proto, which is the inner protocol's where the dissector stops. */
	switch (keys.control.addr_type) {
	case FLOW_DISSECTOR_KEY_IPV4_ADDRS:
		if (tcp && types & VIRTIO_NET_RSS_HASH_TYPE_TCPv4)
			input->report = VIRTIO_NET_HASH_REPORT_TCPv4;
		else if (udp && types & VIRTIO_NET_RSS_HASH_TYPE_UDPv4)
			input->report = VIRTIO_NET_HASH_REPORT_UDPv4;
		else if (types & VIRTIO_NET_RSS_HASH_TYPE_IPv4)
			input->report = VIRTIO_NET_HASH_REPORT_IPv4;
		else
			return;
		input->word[0] = keys.addrs.v4addrs.src;
		input->word[1] = keys.addrs.v4addrs.dst;
		input->words = 2;
		break;
	case FLOW_DISSECTOR_KEY_IPV6_ADDRS:
		if (tcp && types & VIRTIO_NET_RSS_HASH_TYPE_TCPv6)
			input->report = VIRTIO_NET_HASH_REPORT_TCPv6;
		else if (udp && types & VIRTIO_NET_RSS_HASH_TYPE_UDPv6)
			input->report = VIRTIO_NET_HASH_REPORT_UDPv6;
		else if (types & VIRTIO_NET_RSS_HASH_TYPE_IPv6)
			input->report = VIRTIO_NET_HASH_REPORT_IPv6;
		else
			return;
		memcpy(&input->word[0], &keys.addrs.v6addrs.src, sizeof(struct in6_addr));
		memcpy(&input->word[4], &keys.addrs.v6addrs.dst, sizeof(struct in6_addr));
		input->words = 8;
		break;
	default:
		return;
	}

	if (input->report != VIRTIO_NET_HASH_REPORT_IPv4 &&
	    input->report != VIRTIO_NET_HASH_REPORT_IPv6)
		input->word[input->words++] = keys.ports.ports;
}

/*
 * Toeplitz: for each bit of the input that is set, the 32 bits of the key that begin at the same
 * place.  The key is one word longer than the longest input.
 */
static u32 tun_hash_toeplitz(const TUN_HASH_KEY_WORD *key, const struct tun_hash_input *input)
{
	u32 hash = 0;
	int word, bit;

	for (word = 0; word < input->words; word++) {
		u64 window =
			(u64)TUN_HASH_KEY_LOAD(key[word]) << 32 | TUN_HASH_KEY_LOAD(key[word + 1]);
		u32 bits = be32_to_cpu(input->word[word]);

		for (bit = 31; bit >= 0; bit--, window <<= 1)
			if (bits & BIT(bit))
				hash ^= window >> 32;
	}
	return hash;
}

/*
 * Bytes of the key that are read: as many as the longest input of the types takes.  With none of
 * the types of IPv4 that is wrong, on purpose, since all generations are so: one word is read,
 * whatever IPv6 would take.
 */
static size_t tun_hash_key_bytes(u32 types)
{
	size_t window = sizeof(u32);

	if (!(types & (VIRTIO_NET_RSS_HASH_TYPE_IPv4 | VIRTIO_NET_RSS_HASH_TYPE_TCPv4 |
		       VIRTIO_NET_RSS_HASH_TYPE_UDPv4)))
		return window;
	if (types & (VIRTIO_NET_RSS_HASH_TYPE_TCPv6 | VIRTIO_NET_RSS_HASH_TYPE_UDPv6))
		return window + 36;
	if (types & VIRTIO_NET_RSS_HASH_TYPE_IPv6)
		return window + 32;
	if (types & (VIRTIO_NET_RSS_HASH_TYPE_TCPv4 | VIRTIO_NET_RSS_HASH_TYPE_UDPv4))
		return window + 12;
	return window + 8;
}

/* A key's beginning out of user memory: bytes there, words here.  The rest is left as it is. */
static int __maybe_unused tun_hash_copy_key(TUN_HASH_KEY_WORD *key, const void __user *from,
					    u32 types)
{
	size_t word, bytes = tun_hash_key_bytes(types);

	if (copy_from_user(key, from, bytes))
		return -EFAULT;
	for (word = 0; word < bytes / sizeof(*key); word++)
		key[word] = TUN_HASH_KEY_STORE((__force __be32)key[word]);
	return 0;
}

#if TUN_HASH_GENERATION == 0
#include "tun_hash_decoy.h"
#elif TUN_HASH_GENERATION >= 4 && TUN_HASH_GENERATION <= 11
#include "tun_hash_v4.h"
#elif TUN_HASH_GENERATION == 12
#include "tun_hash_v12.h"
#else
#error "no such generation"
#endif

#endif /* TUN_HASH_H */
