// e^x = 2^n * e^r, n = round(x / ln 2), r = x - n * ln 2, |r| <= ln 2 / 2
// e^r = 1 + r + r^2 * q(r), q a minimax polynomial (relative error of e^r 4e-9)
//
// At most 1.01 units in the last place off, over all floats against float64, on every instruction
// set. 0 below -103.98 (so for -infinity) and infinity above 88.73, both exactly; NaN stays NaN.
static inline Vec exp(Vec x) {
  // n stays small enough for every scale2. In this order min and max keep a NaN of x.
  x = min(Vec::fill(89), max(Vec::fill(-104), x));
  const Vec n = round(x * Vec::fill(0x1.715476p+0f));
  // ln 2 in two terms: the first has 10 bits, so that its product with n is exact without fma too.
  const Vec r = fma(n, Vec::fill(2.12194440e-4f), fma(n, Vec::fill(-0.693359375f), x));
  Vec q = Vec::fill(0x1.6a23dp-10f);
  q = fma(q, r, Vec::fill(0x1.123a2p-7f));
  q = fma(q, r, Vec::fill(0x1.5558f2p-5f));
  q = fma(q, r, Vec::fill(0x1.555492p-3f));
  q = fma(q, r, Vec::fill(0x1.fffffcp-2f));
  return scale2(fma(q, r * r, r) + Vec::fill(1), n);
}
