/* Products of a tile of flash.c, which says what a unit is: on vectors, and by AMX. */
/* sum + rows times one unit. */
INLINE vec FN(multiply)(vec sum, vec rows, uint32_t unit) {
#if PAIR == 2
    return (vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)rows, (__m512bh)_mm512_set1_epi32((int)unit));
#else
    float x;
    memcpy(&x, &unit, 4);
    return sum + rows * x;
#endif
}

/* M rows of `sum` [..][N] get a [M][count units] b [count units][N], `added` to what they hold or not; a unit lies at m * across
 * + k * along. The products of CHAIN units are summed first: the error of a sum grows with its length. */
#define M 4
#define CHAIN 64
INLINE void FN(outer)(vec *sum, const uint32_t *a, long across, long along, const vec *b, long count, const int added, const int N) {
    for (long from = 0; from < count; from += CHAIN) {
        vec s[M * MOST] = {0};
        for (long k = from; k < count && k < from + CHAIN; k++) {
            vec rows[MOST];
            _Pragma("GCC unroll 4") for (int n = 0; n < N; n++) rows[n] = b[k * N + n];
            _Pragma("GCC unroll 4") for (int m = 0; m < M; m++)
                _Pragma("GCC unroll 4") for (int n = 0; n < N; n++)
                    s[m * N + n] = FN(multiply)(s[m * N + n], rows[n], a[m * across + k * along]);
        }
        _Pragma("GCC unroll 16") for (int i = 0; i < M * N; i++) sum[i] = added || from ? sum[i] + s[i] : s[i];
    }
}

#ifdef HAS_TILES
/* 16 rows of `sum` get the products, `added` to what they hold or not: tiles 0 to 3 are sums, 4 of a, 5 and 6 of b. */
LOCAL void FN(outer_tiles)(vec *sum, const uint32_t *a, long across, const vec *b, long count, const int added, const int N) {
    TILES_READ();
#define COLUMNS(DO)                                                                                                    \
    DO(0, 5)                                                                                                           \
    if (N > 1) DO(1, 6)                                                                                                \
    if (N > 2) DO(2, 5)                                                                                                \
    if (N > 3) DO(3, 6)
#define BEGIN(n, B)                                                                                                    \
    {                                                                                                                  \
        if (added)                                                                                                     \
            _tile_loadd(n, sum + n, N * 64);                                                                           \
        else                                                                                                           \
            _tile_zero(n);                                                                                             \
    }
#define MULTIPLY(n, B)                                                                                                 \
    {                                                                                                                  \
        _tile_loadd(B, b + k * N + n, N * 64);                                                                         \
        _tile_dpbf16ps(n, 4, B);                                                                                       \
    }
#define STORE(n, B) _tile_stored(n, sum + n, N * 64);
    COLUMNS(BEGIN)
    for (long k = 0; k < count; k += WIDTH) {
        _tile_loadd(4, a + k, across * 4);
        COLUMNS(MULTIPLY)
    }
    COLUMNS(STORE)
    TILES_READ();
#undef COLUMNS
#undef BEGIN
#undef MULTIPLY
#undef STORE
}

/* Values of a block with the units of a number side by side, as tiles of rows read them. */
LOCAL void FN(turn)(const uint32_t *value, long room, uint32_t *to) {
    for (long t = 0; t < BLOCK / PAIR; t += WIDTH)
        for (long d = 0; d < room; d += WIDTH) {
            ivec lanes[WIDTH];
            for (int i = 0; i < WIDTH; i++) memcpy(lanes + i, value + (t + i) * room + d, sizeof *lanes);
            FN(transpose)(lanes);
            for (int i = 0; i < WIDTH; i++) memcpy(to + (d + i) * (BLOCK / PAIR) + t, lanes + i, sizeof *lanes);
        }
}
#endif
