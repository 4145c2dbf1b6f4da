// y[i] = max(0, x[i]) and its gradient.

static void relu(const float* x, float* y, int64_t begin, int64_t end) {
  int64_t i = begin;
  for (; i + Vec::kWidth <= end; i += Vec::kWidth) max(Vec::zero(), Vec::load(x + i)).store(y + i);
  const int64_t n = end - i;  // this order of max keeps NaN and -0.0, as torch does
  max(Vec::zero(), Vec::load(x + i, n)).store(y + i, n);
}

static void relu_backward(const float* grad_y, const float* y, float* grad_x, int64_t begin,
                          int64_t end) {
  const Source grad = {grad_y, y};
  for (int64_t i = begin; i < end; i += Vec::kWidth) {
    const int64_t n = least(end - i, Vec::kWidth);
    grad.at(i, n).store(grad_x + i, n);
  }
}
