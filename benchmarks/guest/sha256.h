/*
 * sha256.h - SHA-256 (FIPS 180-4) for xfer.c: the guests carry no crypto library.
 *
 * Use         sha256_start, sha256_add as often as needed, sha256_end. The C is plain on purpose:
 *             one end runs on an emulated CPU, where vector instructions cost more than they save.
 */
#ifndef SHA256_H
#define SHA256_H

#include <endian.h>
#include <stdint.h>
#include <string.h>

struct sha256 {
    uint32_t state[8];
    uint64_t bytes;
    uint8_t block[64];
};

static const uint32_t K[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};

static uint32_t rotated(uint32_t x, int n)
{
    return x >> n | x << (32 - n);
}

static void sha256_block(uint32_t state[8], const uint8_t *block)
{
    uint32_t w[64];

    for (int i = 0; i < 16; i++) {
        memcpy(&w[i], block + 4 * i, 4);
        w[i] = be32toh(w[i]);
    }
    for (int i = 16; i < 64; i++) {
        uint32_t a = w[i - 15], b = w[i - 2];

        w[i] = w[i - 16] + (rotated(a, 7) ^ rotated(a, 18) ^ a >> 3) + w[i - 7] +
               (rotated(b, 17) ^ rotated(b, 19) ^ b >> 10);
    }
    uint32_t a = state[0], b = state[1], c = state[2], d = state[3];
    uint32_t e = state[4], f = state[5], g = state[6], h = state[7];

#pragma GCC unroll 8 /* eight rounds bring every variable home: no moves are left */
    for (int i = 0; i < 64; i++) {
        uint32_t s1 = rotated(e, 6) ^ rotated(e, 11) ^ rotated(e, 25);
        uint32_t s0 = rotated(a, 2) ^ rotated(a, 13) ^ rotated(a, 22);
        uint32_t t1 = h + s1 + (g ^ (e & (f ^ g))) + K[i] + w[i];
        uint32_t t2 = s0 + ((a & b) | (c & (a | b)));

        h = g, g = f, f = e, e = d + t1;
        d = c, c = b, b = a, a = t1 + t2;
    }
    state[0] += a, state[1] += b, state[2] += c, state[3] += d;
    state[4] += e, state[5] += f, state[6] += g, state[7] += h;
}

static void sha256_start(struct sha256 *sha)
{
    static const uint32_t first[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                      0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};

    memcpy(sha->state, first, sizeof(first));
    sha->bytes = 0;
}

static void sha256_add(struct sha256 *sha, const uint8_t *data, size_t size)
{
    size_t held = sha->bytes % 64;

    sha->bytes += size;
    if (held + size < 64) {
        memcpy(sha->block + held, data, size);
        return;
    }
    if (held) {
        memcpy(sha->block + held, data, 64 - held);
        sha256_block(sha->state, sha->block);
        data += 64 - held;
        size -= 64 - held;
    }
    for (; size >= 64; data += 64, size -= 64)
        sha256_block(sha->state, data);
    memcpy(sha->block, data, size);
}

static void sha256_end(struct sha256 *sha, uint8_t digest[32])
{
    uint8_t padding[72] = {0x80};
    uint64_t bits = htobe64(sha->bytes * 8);
    size_t zeros = (119 - sha->bytes % 64) % 64 + 1;

    memcpy(padding + zeros, &bits, 8);
    sha256_add(sha, padding, zeros + 8);
    for (int i = 0; i < 8; i++) {
        uint32_t word = htobe32(sha->state[i]);

        memcpy(digest + 4 * i, &word, 4);
    }
}

#endif
