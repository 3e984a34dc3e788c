/* step_wide.cu: the chain of mamba_step for many rows, kernel after kernel, and its buffers. */
#include "kernels/cuda/step_wide.cuh"

enum { ALIGNMENT = 256 };

struct buffers {
    struct step_wide_header *header;
    float *r, *z, *x_dbl;
    step_type *h, *xc, *y;
    float *squares, *u_in, *u_x, *u_out;
    step_type *factors;
    int64_t bytes;
};

static void *carve(char *base, int64_t *at, int64_t bytes)
{
    void *here = base + *at;
    *at += (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    return here;
}

static struct buffers lay_out(const struct mamba_step_args *a, void *workspace)
{
    struct buffers b = {};
    char *base = (char *)workspace;
    int64_t *at = &b.bytes, width = a->dt_rank + 2 * a->d_state, f = sizeof(float), t = sizeof(step_type);
    int64_t part = STEP_WIDE_ROWS * f, factors = part * STEP_RANK;
    int64_t d_parts = divide_up(a->d_model, 64), c_parts = divide_up(a->d_inner, 64);
    b.header = (struct step_wide_header *)carve(base, at, sizeof(struct step_wide_header));
    b.r = (float *)carve(base, at, STEP_WIDE_ROWS * a->d_model * f);
    b.h = (step_type *)carve(base, at, STEP_WIDE_ROWS * a->d_model * t);
    b.xc = (step_type *)carve(base, at, STEP_WIDE_ROWS * a->d_inner * t);
    b.z = (float *)carve(base, at, STEP_WIDE_ROWS * a->d_inner * f);
    b.x_dbl = (float *)carve(base, at, STEP_WIDE_ROWS * width * f);
    b.y = (step_type *)carve(base, at, STEP_WIDE_ROWS * a->d_inner * t);
    b.squares = (float *)carve(base, at, d_parts * part);
    b.u_in = (float *)carve(base, at, d_parts * factors);
    b.u_x = (float *)carve(base, at, c_parts * factors);
    b.u_out = (float *)carve(base, at, step_wide_scan_parts(a->d_inner) * factors);
    b.factors =
        (step_type *)carve(base, at, step_wide_factors(a->d_model, a->d_inner, a->n_layers, STEP_IN) * t);
    return b;
}

int64_t step_wide_workspace(const struct mamba_step_args *a)
{
    return lay_out(a, NULL).bytes;
}

/* One layer's row of the table of adapters; NULL without them. */
static const struct step_lora *lora_of(const struct step_wide *chain, int64_t layer)
{
    return chain->table != NULL ? chain->table + layer * STEP_ADAPTERS : NULL;
}

static int launch_product(struct kernel_device *device, enum step_mode mode, struct step_wide_linear *p,
                          const void *weight, const step_type *x, const step_type *factors)
{
    int status = cuda_tile_map(&p->weight, weight, p->m, p->k, p->k,
                               step_wide_linear_outputs(mode, p->m, p->k, p->rows), TYPE_BF16);
    if (status == KERNEL_OK)
        status = cuda_tile_map(&p->x, x, p->rows, p->k, p->k,
                               step_wide_linear_rows(mode, p->m, p->k, p->rows), TYPE_BF16);
    if (status == KERNEL_OK && p->adapted == STEP_SHARED)
        status = cuda_tile_map(&p->a, factors, STEP_WIDE_SHARED, p->k, p->k, STEP_WIDE_SHARED, TYPE_BF16);
    return status == KERNEL_OK ? step_wide_launch_linear(device, mode, p) : status;
}

/* The parts of a row's sums that in_proj makes of x, and out_proj of r. */
static int in_parts(const struct mamba_step_args *a, int rows)
{
    return (int)divide_up(a->d_inner,
                          step_wide_linear_outputs(STEP_MODE_IN, 2 * a->d_inner, a->d_model, rows));
}
static int out_parts(const struct mamba_step_args *a, int rows)
{
    return (int)divide_up(a->d_model, step_wide_linear_outputs(STEP_MODE_OUT, a->d_model, a->d_inner, rows));
}

static int emit_layer(struct kernel_device *device, const struct step_wide *chain, const struct buffers *b,
                      int64_t layer, struct step_parts squares, struct step_parts u_in)
{
    const struct mamba_step_args *a = chain->args;
    const struct mamba_step_layer *l = &a->layers[layer];
    const int d = (int)a->d_model, c = (int)a->d_inner, width = (int)(a->dt_rank + 2 * a->d_state);
    const struct step_lora *lora = lora_of(chain, layer);
    float *states = a->states + layer * (STEP_CONV - 1 + STEP_STATE) * a->d_inner;
    auto factors = [&](int target) { return b->factors + step_wide_factors(d, c, layer, target); };
    auto fed = [&](const struct step_lora *next) { return chain->adapted == STEP_MIXED ? next : NULL; };

    struct step_wide_linear in = {};
    in.adapted = chain->adapted;
    in.header = b->header;
    in.rows = chain->rows;
    in.m = 2 * c;
    in.k = d;
    in.first = layer == 0;
    in.eps = a->eps;
    in.bias = l->in_bias;
    in.lora = lora;
    in.next_lora = fed(lora);
    in.squares = squares;
    in.u = u_in;
    in.next_u = {b->u_x, in_parts(a, chain->rows)};
    in.inner = c;
    in.conv = l->conv;
    in.conv_bias = l->conv_bias;
    in.states = states;
    in.slot_stride = a->slot_stride;
    in.xc = b->xc;
    in.z = b->z;
    int status = launch_product(device, STEP_MODE_IN, &in, l->in_proj, b->h, factors(STEP_IN));

    struct step_wide_linear x = {};
    x.adapted = chain->adapted;
    x.header = b->header;
    x.rows = chain->rows;
    x.m = width;
    x.k = c;
    x.lora = lora;
    x.u = in.next_u;
    x.y = b->x_dbl;
    if (status == KERNEL_OK)
        status = launch_product(device, STEP_MODE_X, &x, l->x_proj, b->xc, factors(STEP_X));

    struct step_wide_scan scan = {};
    scan.header = b->header;
    scan.rows = chain->rows;
    scan.inner = c;
    scan.rank = (int)a->dt_rank;
    scan.width = width;
    scan.dt_proj = (const step_type *)l->dt_proj;
    scan.a = l->a;
    scan.d = l->d;
    scan.dt_bias = l->dt_bias;
    scan.states = states + (STEP_CONV - 1) * a->d_inner;
    scan.slot_stride = a->slot_stride;
    scan.xc = b->xc;
    scan.x_dbl = b->x_dbl;
    scan.z = b->z;
    scan.y = b->y;
    scan.lora = lora;
    scan.adapted = chain->adapted;
    scan.next_u = {b->u_out, step_wide_scan_parts(c)};
    scan.ahead = l->out_proj;
    scan.ahead_bytes = (int64_t)d * c * (int64_t)sizeof(step_type);
    if (status == KERNEL_OK)
        status = step_wide_launch_scan(device, &scan);

    const bool last = layer + 1 == a->n_layers;
    struct step_wide_linear out = {};
    out.adapted = chain->adapted;
    out.header = b->header;
    out.rows = chain->rows;
    out.m = d;
    out.k = c;
    out.bias = l->out_bias;
    out.lora = lora;
    out.next_lora = last ? NULL : fed(lora_of(chain, layer + 1));
    out.u = scan.next_u;
    out.next_squares = {b->squares, 0};
    out.next_u = {b->u_in, 0};
    out.r = b->r;
    out.norm = last ? a->norm_f : l[1].norm;
    out.h = b->h;
    if (status == KERNEL_OK)
        status = launch_product(device, STEP_MODE_OUT, &out, l->out_proj, b->y, factors(STEP_OUT));
    return status;
}

static int emit_head(struct kernel_device *device, const struct step_wide *chain, const struct buffers *b,
                     struct step_parts squares)
{
    const struct mamba_step_args *a = chain->args;
    struct step_wide_linear head = {};
    head.header = b->header;
    head.rows = chain->rows;
    head.m = (int)a->vocab;
    head.k = (int)a->d_model;
    head.eps = a->eps;
    head.squares = squares;
    head.y = a->logits;
    head.r = b->r;
    head.norm = a->norm_f;
    head.h = (step_type *)a->hidden;
    return launch_product(device, STEP_MODE_HEAD, &head, a->head, b->h, NULL);
}

int step_wide_emit(struct kernel_device *device, const struct step_wide *chain)
{
    const struct mamba_step_args *a = chain->args;
    const struct buffers b = lay_out(a, chain->workspace);
    struct step_wide_embed embed = {};
    embed.from = chain->from;
    embed.header = b.header;
    embed.table = (const step_type *)a->embedding;
    embed.d = (int)a->d_model;
    embed.vocab = a->vocab;
    embed.norm = a->layers[0].norm;
    embed.lora = lora_of(chain, a->n_layers);
    embed.next_lora = chain->adapted == STEP_MIXED ? lora_of(chain, 0) : NULL;
    embed.rows = chain->rows;
    embed.factors = chain->adapted == STEP_SHARED ? b.factors : NULL;
    embed.layers_lora = chain->table;
    embed.inner = (int)a->d_inner;
    embed.layers = (int)a->n_layers;
    embed.r = b.r;
    embed.h = b.h;
    embed.next_squares = {b.squares, 1};
    embed.next_u = {b.u_in, 1};
    int status = step_wide_launch_embed(device, &embed);
    struct step_parts squares = embed.next_squares, u_in = embed.next_u;
    for (int64_t layer = 0; layer < a->n_layers && status == KERNEL_OK; layer++) {
        status = emit_layer(device, chain, &b, layer, squares, u_in);
        squares.count = u_in.count = out_parts(a, chain->rows);
    }
    return status == KERNEL_OK ? emit_head(device, chain, &b, squares) : status;
}
