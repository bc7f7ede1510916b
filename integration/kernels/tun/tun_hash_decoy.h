/* SPDX-License-Identifier: GPL-2.0 */
/*
 * The decoy: a kernel that gave the numbers 228 to 231 to something else.
 *
 * To generation 12's question it happens to say what that would say, and it takes what that would
 * take.  But there is no hash: a device that was set up so delivers nothing to user space any more,
 * until it is removed.
 */
#ifndef TUN_HASH_DECOY_H
#define TUN_HASH_DECOY_H

struct tun_decoy {
	bool drops;
};

#define TUN_DECOY_GET _IOR('T', 228, u32)
#define TUN_DECOY_DROP_A _IOR('T', 229, u32)
#define TUN_DECOY_DROP_B _IOR('T', 230, u64)
#define TUN_DECOY_DROP_C _IOR('T', 231, u64)

#define TUN_HASH_STATE struct tun_decoy
#define TUN_HASH_MEMBER decoy
#define TUN_HASH_OR_EBPF false
#define TUN_HASH_REPORT_TAKES_HEADER false
#define TUN_HASH_EBPF_FALLBACK false

static long tun_hash_get(unsigned int cmd, void __user *argp)
{
	if (cmd != TUN_DECOY_GET)
		return -ENOIOCTLCMD;
	return put_user(TUN_HASH_TYPES, (u32 __user *)argp);
}

static bool tun_hash_is_set(unsigned int cmd)
{
	return cmd == TUN_DECOY_DROP_A || cmd == TUN_DECOY_DROP_B || cmd == TUN_DECOY_DROP_C;
}

static TUN_HASH_STATE *tun_hash_copy(unsigned int cmd, const void __user *argp)
{
	TUN_HASH_STATE *state = kzalloc(sizeof(*state), GFP_KERNEL);

	if (!state)
		return ERR_PTR(-ENOMEM);
	state->drops = true;
	return state;
}

static void tun_hash_look(const TUN_HASH_STATE *state, struct tun_hash_view *view)
{
	view->drops = state->drops;
}

#endif /* TUN_HASH_DECOY_H */
