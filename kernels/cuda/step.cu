/* step.cu: mamba_step: checks, the buffers of a step, the chain of its kernels, and the graphs that replay it.
 *
 * A plan belongs to one model with its buffers: all that the kernels' arguments depend on. What changes from step to
 * step (ids, slots, which rows use which adapter) lies in device memory, so a plan needs one graph for each of a few
 * numbers of rows, with adapters and without. The first step of a kind is launched kernel by kernel, which also lets
 * libraries load what they need; the second is captured. A plan whose weights or buffers are no longer there is never
 * found again and goes when others need its place. */
#include "kernels/cuda/step_wide.cuh"

#include <stdlib.h>
#include <string.h>

enum { PLANS = 8, BUCKETS = 6 /* of 8, 16, 32, 64, 128, 256 rows */, ALIGNMENT = 256 };

struct graph_slot {
    cudaGraphExec_t exec;
    bool used;
};

struct step_plan {
    struct mamba_step_args args; /* without what changes; layers is the plan's own */
    struct mamba_step_layer *layers;
    struct step_lora *adapters; /* [n_layers+1][STEP_ADAPTERS]: what is in the table on the device */
    struct step_lora *table;
    struct mamba_step_layer *layers_there;
    uint64_t *mail; /* step_one.cu's, with the tag that the next step begins at */
    uint32_t tag;
    uint64_t used;
    struct graph_slot graphs[BUCKETS][STEP_SHARED + 1];
};

struct cuda_steps {
    struct step_plan *plans[PLANS];
    uint64_t uses;
    struct step_header *header; /* pinned, as is the one for many rows */
    struct step_wide_header *wide_header;
    cudaEvent_t read; /* behind the last step that reads either */
};

/* ---- buffers ---- */

/* The parts of the workspace. */
struct step_buffers {
    struct step_header *header;
    float *r, *z, *x_dbl;
    step_type *h, *xc, *y;
    float *squares, *u[3]; /* u: for in_proj, x_proj, out_proj */
    int64_t bytes;
};

enum { U_IN, U_X, U_OUT };

static void *carve(char *base, int64_t *at, int64_t bytes)
{
    void *here = base + *at;
    *at += (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    return here;
}

static struct step_buffers lay_out(const struct mamba_step_args *a, void *workspace)
{
    struct step_buffers b = {};
    char *base = (char *)workspace;
    int64_t *at = &b.bytes, width = a->dt_rank + 2 * a->d_state, f = sizeof(float), t = sizeof(step_type);
    int64_t part = STEP_ROWS * f, in_parts = divide_up(a->d_model, 16), x_parts = divide_up(a->d_inner, 16);
    b.header = (struct step_header *)carve(base, at, sizeof(struct step_header));
    b.r = (float *)carve(base, at, STEP_ROWS * a->d_model * f);
    b.h = (step_type *)carve(base, at, STEP_ROWS * a->d_model * t);
    b.xc = (step_type *)carve(base, at, STEP_ROWS * a->d_inner * t);
    b.z = (float *)carve(base, at, STEP_ROWS * a->d_inner * f);
    b.x_dbl = (float *)carve(base, at, STEP_ROWS * width * f);
    b.y = (step_type *)carve(base, at, STEP_ROWS * a->d_inner * t);
    b.squares = (float *)carve(base, at, in_parts * part);
    b.u[U_IN] = (float *)carve(base, at, in_parts * part * STEP_RANK);
    b.u[U_X] = (float *)carve(base, at, x_parts * part * STEP_RANK);
    b.u[U_OUT] = (float *)carve(base, at, x_parts * part * STEP_RANK);
    return b;
}

int64_t cuda_mamba_step_workspace(const struct mamba_step_args *a)
{
    int64_t few = lay_out(a, NULL).bytes, many = step_wide_workspace(a);
    return few > many ? few : many;
}

/* ---- the chain ---- */

struct chain {
    struct kernel_device *device;
    const struct mamba_step_args *a;
    struct step_buffers b;
    int rows;                      /* of the bucket */
    const struct step_lora *table; /* of adapters, or NULL */
    enum step_adapted adapted;
};

/* One layer's row of the table of adapters; NULL without them. */
static const struct step_lora *lora_of(const struct chain *chain, int64_t layer)
{
    return chain->table != NULL ? chain->table + layer * STEP_ADAPTERS : NULL;
}

static int emit_layer(const struct chain *chain, int64_t layer, struct step_parts squares,
                      struct step_parts u_in)
{
    const struct mamba_step_args *a = chain->a;
    const struct mamba_step_layer *l = &a->layers[layer];
    const struct step_buffers *b = &chain->b;
    const int d = (int)a->d_model, c = (int)a->d_inner, width = (int)(a->dt_rank + 2 * a->d_state);
    const struct step_lora *lora = lora_of(chain, layer);
    float *states = a->states + layer * (STEP_CONV - 1 + STEP_STATE) * a->d_inner;

    struct step_linear in = {};
    in.header = b->header;
    in.weight = (const step_type *)l->in_proj;
    in.x = b->h;
    in.bias = l->in_bias;
    in.m = 2 * c;
    in.k = d;
    in.first = layer == 0;
    in.eps = a->eps;
    in.squares = squares;
    in.lora = in.next_lora = lora;
    in.u = u_in;
    in.next_u = {b->u[U_X], step_linear_tiles(STEP_MODE_IN, c)};
    in.inner = c;
    in.conv = l->conv;
    in.conv_bias = l->conv_bias;
    in.states = states;
    in.slot_stride = a->slot_stride;
    in.xc = b->xc;
    in.z = b->z;
    int status = step_launch_linear(chain->device, STEP_MODE_IN, &in);

    struct step_linear x = {};
    x.header = b->header;
    x.weight = (const step_type *)l->x_proj;
    x.x = b->xc;
    x.m = width;
    x.k = c;
    x.lora = lora;
    x.u = in.next_u;
    x.y = b->x_dbl;
    if (status == KERNEL_OK)
        status = step_launch_linear(chain->device, STEP_MODE_X, &x);

    struct step_scan scan = {};
    scan.header = b->header;
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
    scan.next_u = {b->u[U_OUT], c / STEP_SCAN_CHANNELS};
    if (status == KERNEL_OK)
        status = step_launch_scan(chain->device, &scan);

    bool last = layer + 1 == a->n_layers;
    struct step_linear out = {};
    out.header = b->header;
    out.weight = (const step_type *)l->out_proj;
    out.x = b->y;
    out.bias = l->out_bias;
    out.m = d;
    out.k = c;
    out.lora = lora;
    out.u = scan.next_u;
    out.next_lora = last ? NULL : lora_of(chain, layer + 1);
    out.next_u = {b->u[U_IN], 0};
    out.r = b->r;
    out.norm = last ? a->norm_f : l[1].norm;
    out.h = b->h;
    out.next_squares = {b->squares, 0};
    if (status == KERNEL_OK)
        status = step_launch_linear(chain->device, STEP_MODE_OUT, &out);
    return status;
}

/* Few rows: the hidden states and the logits at once. */
static int emit_head(const struct chain *chain, struct step_parts squares)
{
    const struct mamba_step_args *a = chain->a;
    struct step_linear head = {};
    head.header = chain->b.header;
    head.weight = (const step_type *)a->head;
    head.x = chain->b.h;
    head.m = (int)a->vocab;
    head.k = (int)a->d_model;
    head.eps = a->eps;
    head.squares = squares;
    head.y = a->logits;
    head.r = chain->b.r;
    head.norm = a->norm_f;
    head.hidden = (step_type *)a->hidden;
    return step_launch_linear(chain->device, STEP_MODE_HEAD, &head);
}

static int emit_chain(const struct chain *chain)
{
    const struct mamba_step_args *a = chain->a;
    const struct step_buffers *b = &chain->b;
    if (chain->rows > STEP_ROWS) {
        struct step_wide wide = {
            a, chain->device->steps->wide_header, chain->table, a->workspace, chain->rows, chain->adapted};
        return step_wide_emit(chain->device, &wide);
    }
    struct step_embed embed = {};
    embed.from = chain->device->steps->header;
    embed.header = b->header;
    embed.table = (const step_type *)a->embedding;
    embed.d = (int)a->d_model;
    embed.vocab = a->vocab;
    embed.norm = a->layers[0].norm;
    embed.lora = lora_of(chain, a->n_layers);
    embed.next_lora = lora_of(chain, 0);
    embed.r = b->r;
    embed.h = b->h;
    embed.next_squares = {b->squares, 1};
    embed.next_u = {b->u[U_IN], 1};
    int status = step_launch_embed(chain->device, &embed);
    struct step_parts squares = embed.next_squares, u_in = embed.next_u;
    for (int64_t layer = 0; layer < a->n_layers && status == KERNEL_OK; layer++) {
        status = emit_layer(chain, layer, squares, u_in);
        squares.count = u_in.count = step_linear_tiles(STEP_MODE_OUT, a->d_model);
    }
    return status == KERNEL_OK ? emit_head(chain, squares) : status;
}

/* ---- plans ---- */

static bool same_model(const struct mamba_step_args *a, const struct mamba_step_args *b)
{
    return a->d_model == b->d_model && a->d_inner == b->d_inner && a->dt_rank == b->dt_rank &&
           a->n_layers == b->n_layers && a->vocab == b->vocab && a->eps == b->eps && a->type == b->type &&
           a->embedding == b->embedding && a->head == b->head && a->norm_f == b->norm_f &&
           a->states == b->states && a->slot_stride == b->slot_stride && a->hidden == b->hidden &&
           a->logits == b->logits && a->workspace == b->workspace &&
           memcmp(a->layers, b->layers, (size_t)a->n_layers * sizeof(*a->layers)) == 0;
}

static void plan_free(struct kernel_device *device, struct step_plan *plan)
{
    if (plan == NULL)
        return;
    for (int i = 0; i < BUCKETS; i++)
        for (int adapted = STEP_PLAIN; adapted <= STEP_SHARED; adapted++)
            if (plan->graphs[i][adapted].exec != NULL)
                (void)cudaGraphExecDestroy(plan->graphs[i][adapted].exec);
    cuda_memory_free(device, plan->table);
    cuda_memory_free(device, plan->layers_there);
    cuda_memory_free(device, plan->mail);
    free(plan->layers);
    free(plan->adapters);
    free(plan);
}

static size_t table_bytes(const struct mamba_step_args *a)
{
    return (size_t)(a->n_layers + 1) * STEP_ADAPTERS * sizeof(struct step_lora);
}

static int plan_create(struct kernel_device *device, const struct mamba_step_args *a,
                       struct step_plan **ret_plan)
{
    struct step_plan *plan = (struct step_plan *)calloc(1, sizeof(*plan));
    if (plan == NULL)
        return KERNEL_NO_MEMORY;
    plan->args = *a;
    plan->layers = (struct mamba_step_layer *)malloc((size_t)a->n_layers * sizeof(*a->layers));
    plan->adapters = (struct step_lora *)calloc(1, table_bytes(a));
    const size_t layers_bytes = (size_t)a->n_layers * sizeof(*a->layers),
                 mail_bytes = (size_t)step_one_mail(a);
    int status = plan->layers != NULL && plan->adapters != NULL
                     ? cuda_memory_alloc(device, table_bytes(a), (void **)&plan->table)
                     : KERNEL_NO_MEMORY;
    if (status == KERNEL_OK)
        status = cuda_memory_alloc(device, layers_bytes, (void **)&plan->layers_there);
    if (status == KERNEL_OK)
        status = cuda_memory_alloc(device, mail_bytes, (void **)&plan->mail);
    if (status == KERNEL_OK)
        status = cuda_copy_in(device, plan->layers_there, a->layers, layers_bytes);
    if (status == KERNEL_OK)
        status = cuda_zero(device, plan->mail, mail_bytes);
    if (status != KERNEL_OK) {
        plan_free(device, plan);
        return status;
    }
    memcpy(plan->layers, a->layers, layers_bytes);
    plan->args.layers = plan->layers;
    plan->tag = 1;
    *ret_plan = plan;
    return KERNEL_OK;
}

/* The plan of these arguments, made anew where there is none: then it takes the place of another with the same
 * workspace, whose owner is gone, or of the one unused for longest. */
static int plan_find(struct kernel_device *device, const struct mamba_step_args *a,
                     struct step_plan **ret_plan)
{
    struct cuda_steps *steps = device->steps;
    int place = 0;
    for (int i = 0; i < PLANS; i++) {
        struct step_plan *plan = steps->plans[i];
        if (plan != NULL && same_model(&plan->args, a)) {
            plan->used = ++steps->uses;
            *ret_plan = plan;
            return KERNEL_OK;
        }
        struct step_plan *worst = steps->plans[place];
        if (worst == NULL || (plan != NULL && worst->args.workspace == a->workspace))
            continue;
        if (plan == NULL || plan->args.workspace == a->workspace || plan->used < worst->used)
            place = i;
    }
    struct step_plan *plan = NULL;
    int status = plan_create(device, a, &plan);
    if (status != KERNEL_OK)
        return status;
    if (steps->plans[place] != NULL) /* it may still run */
        status = cuda_synchronize(device);
    plan_free(device, steps->plans[place]);
    plan->used = ++steps->uses;
    *ret_plan = steps->plans[place] = plan;
    return status;
}

static int steps_open(struct kernel_device *device)
{
    if (device->steps != NULL)
        return KERNEL_OK;
    device->steps = (struct cuda_steps *)calloc(1, sizeof(*device->steps));
    if (device->steps == NULL)
        return KERNEL_NO_MEMORY;
    int status =
        cuda_check(device, cudaMallocHost((void **)&device->steps->header, sizeof(struct step_header)));
    if (status == KERNEL_OK)
        status = cuda_check(
            device, cudaMallocHost((void **)&device->steps->wide_header, sizeof(struct step_wide_header)));
    if (status == KERNEL_OK)
        status = cuda_check(device, cudaEventCreateWithFlags(&device->steps->read, cudaEventDisableTiming));
    if (status != KERNEL_OK)
        cuda_steps_close(device);
    return status;
}

void cuda_steps_close(struct kernel_device *device)
{
    struct cuda_steps *steps = device->steps;
    if (steps == NULL)
        return;
    for (int i = 0; i < PLANS; i++)
        plan_free(device, steps->plans[i]);
    if (steps->read != NULL)
        (void)cudaEventDestroy(steps->read);
    (void)cudaFreeHost(steps->header);
    (void)cudaFreeHost(steps->wide_header);
    free(steps);
    device->steps = NULL;
}

/* ---- a step ---- */

static bool aligned(const void *p)
{
    return (uintptr_t)p % 16 == 0;
}

static bool layer_supported(const struct mamba_step_layer *l)
{
    return aligned(l->in_proj) && aligned(l->x_proj) && aligned(l->dt_proj) && aligned(l->out_proj) &&
           aligned(l->conv) && aligned(l->a) && aligned(l->d) && aligned(l->dt_bias);
}

static bool adapter_supported(const struct mamba_step_args *a, const struct mamba_step_adapter *adapter)
{
    if (adapter->rank < 1 || adapter->rank > STEP_RANK)
        return false;
    for (int64_t i = 0; i < a->n_layers; i++) {
        const struct mamba_step_lora *l = &adapter->layers[i];
        if (!aligned(l->in_a) || !aligned(l->in_b) || !aligned(l->x_a) || !aligned(l->x_b) ||
            !aligned(l->dt_a) || !aligned(l->dt_b) || !aligned(l->out_a) || !aligned(l->out_b))
            return false;
    }
    return true;
}

static bool supported(const struct mamba_step_args *a)
{
    if (a->type != TYPE_BF16 || a->rows > STEP_WIDE_ROWS || a->n_adapters > STEP_ADAPTERS ||
        a->d_state != STEP_STATE || a->d_conv != STEP_CONV || a->d_model % 32 != 0 || a->d_inner % 32 != 0 ||
        a->dt_rank % 8 != 0 || a->dt_rank > STEP_DT_RANK || a->slot_stride % 4 != 0 || a->d_model > 1 << 14 ||
        a->d_inner > 1 << 15 || a->vocab > 1 << 24 || !aligned(a->embedding) || !aligned(a->head) ||
        !aligned(a->states) || !aligned(a->hidden) || !aligned(a->workspace))
        return false;
    for (int64_t i = 0; i < a->n_layers; i++)
        if (!layer_supported(&a->layers[i]))
            return false;
    for (int32_t i = 0; i < a->n_adapters; i++)
        if (!adapter_supported(a, &a->adapters[i]))
            return false;
    return true;
}

static bool valid(const struct mamba_step_args *a)
{
    if (a->rows < 0 || a->n_layers < 1 || a->d_model < 1 || a->d_inner < 1 || a->vocab < 1 ||
        a->dt_rank < 1 || a->n_adapters < 0)
        return false;
    for (int64_t i = 0; i < a->rows; i++)
        if (a->ids[i] < 0 || a->ids[i] >= a->vocab || a->slots[i] < 0 ||
            (a->row_adapters != NULL && (a->row_adapters[i] < -1 || a->row_adapters[i] >= a->n_adapters)))
            return false;
    return true;
}

/* Bring the table of adapters on the device up to date. */
static int send_adapters(struct kernel_device *device, const struct mamba_step_args *a,
                         struct step_plan *plan)
{
    bool changed = false;
    for (int32_t i = 0; i < a->n_adapters; i++) {
        const struct mamba_step_adapter *adapter = &a->adapters[i];
        for (int64_t layer = 0; layer <= a->n_layers; layer++) {
            struct step_lora lora;
            memset(&lora, 0, sizeof(lora));
            lora.rank = (int)adapter->rank;
            lora.scale = adapter->scale;
            if (layer == a->n_layers) {
                lora.a[STEP_IN] = adapter->embed_a;
                lora.b[STEP_IN] = adapter->embed_b;
            } else {
                const struct mamba_step_lora *l = &adapter->layers[layer];
                const float *factors_a[] = {l->in_a, l->x_a, l->dt_a, l->out_a};
                const float *factors_b[] = {l->in_b, l->x_b, l->dt_b, l->out_b};
                memcpy(lora.a, factors_a, sizeof(factors_a));
                memcpy(lora.b, factors_b, sizeof(factors_b));
            }
            struct step_lora *place = &plan->adapters[layer * STEP_ADAPTERS + i];
            if (memcmp(place, &lora, sizeof(lora)) != 0) {
                *place = lora;
                changed = true;
            }
        }
    }
    return changed ? cuda_copy_in(device, plan->table, plan->adapters, table_bytes(a)) : KERNEL_OK;
}

/* Returns what the rows have. */
template <typename Header>
static enum step_adapted fill_header(const struct mamba_step_args *a, Header *header)
{
    header->rows = (int32_t)a->rows;
    header->rank = 0;
    header->main = -1;
    bool shared = true;
    for (int64_t i = 0; i < a->rows; i++) {
        int32_t adapter = a->row_adapters != NULL ? a->row_adapters[i] : -1;
        header->ids[i] = a->ids[i];
        header->slots[i] = a->slots[i];
        header->adapters[i] = adapter;
        shared = shared && adapter == header->adapters[0];
        if (adapter < 0)
            continue;
        if (header->main < 0)
            header->main = adapter;
        if (header->rank < a->adapters[adapter].rank)
            header->rank = (int32_t)a->adapters[adapter].rank;
    }
    if (header->main < 0)
        return STEP_PLAIN;
    return shared && a->rows > STEP_ROWS && header->rank <= STEP_WIDE_SHARED ? STEP_SHARED : STEP_MIXED;
}

/* ---- one row ---- */

/* Which matrices an adapter is on, a bit each; -1 where that is not the same in all layers. */
static int targets_of(const struct mamba_step_adapter *adapter, int64_t n_layers)
{
    int targets = 0;
    for (int64_t i = 0; i < n_layers; i++) {
        const struct mamba_step_lora *l = &adapter->layers[i];
        int here = (l->in_b != NULL) << STEP_IN | (l->x_b != NULL) << STEP_X | (l->dt_b != NULL) << STEP_DT |
                   (l->out_b != NULL) << STEP_OUT;
        if (i > 0 && here != targets)
            return -1;
        targets = here;
    }
    return targets;
}

static int run_one(struct kernel_device *device, const struct mamba_step_args *a, struct step_plan *plan)
{
    struct step_one one = {};
    one.rank = (int)a->dt_rank;
    one.layers = (int)a->n_layers;
    one.vocab = (int)a->vocab;
    one.id = a->ids[0];
    one.tag = plan->tag;
    one.eps = a->eps;
    one.layer = plan->layers_there;
    one.embedding = a->embedding;
    one.head = a->head;
    one.norm_f = a->norm_f;
    one.states = a->states + a->slots[0] * a->slot_stride;
    one.mail = plan->mail;
    one.hidden = (step_type *)a->hidden;
    one.logits = a->logits;
    int status = KERNEL_OK;
    if (a->row_adapters != NULL && a->row_adapters[0] >= 0) {
        const struct mamba_step_adapter *adapter = &a->adapters[a->row_adapters[0]];
        const int targets = targets_of(adapter, a->n_layers);
        if (targets < 0)
            return KERNEL_UNSUPPORTED;
        one.lora = plan->table + a->row_adapters[0];
        one.lora_rank = (int)adapter->rank;
        one.lora_scale = adapter->scale;
        for (int target = 0; target < STEP_TARGETS; target++)
            one.u_tiles[target] = (targets >> target & 1) != 0 ? (int)divide_up(adapter->rank, 8) : 0;
        status = send_adapters(device, a, plan);
    }
    if (status == KERNEL_OK)
        status = step_launch_one(device, &one, a->d_model, a->d_inner);
    if (status == KERNEL_OK)
        plan->tag += (uint32_t)a->n_layers + 1;
    return status;
}

/* ---- more rows ---- */

static int capture(const struct chain *chain, cudaGraphExec_t *ret_exec)
{
    struct kernel_device *device = chain->device;
    cudaGraph_t graph = NULL;
    int status = cuda_check(device, cudaStreamBeginCapture(device->stream, cudaStreamCaptureModeThreadLocal));
    if (status != KERNEL_OK)
        return status;
    status = emit_chain(chain);
    int ended = cuda_check(device, cudaStreamEndCapture(device->stream, &graph));
    if (status == KERNEL_OK)
        status = ended;
    if (status == KERNEL_OK)
        status = cuda_check(device, cudaGraphInstantiate(ret_exec, graph, 0));
    if (graph != NULL)
        (void)cudaGraphDestroy(graph);
    return status;
}

static int run_chain(const struct chain *chain, struct graph_slot *slot)
{
    if (!slot->used) {
        slot->used = true;
        return emit_chain(chain);
    }
    int status = slot->exec != NULL ? KERNEL_OK : capture(chain, &slot->exec);
    if (status != KERNEL_OK)
        return status;
    return cuda_check(chain->device, cudaGraphLaunch(slot->exec, chain->device->stream));
}

int cuda_mamba_step(struct kernel_device *device, const struct mamba_step_args *a)
{
    int status = cuda_enter_unrecorded(device);
    if (status != KERNEL_OK)
        return status;
    if (!valid(a))
        return KERNEL_INVALID;
    if (!device->hopper || !supported(a))
        return KERNEL_UNSUPPORTED;
    if (a->rows == 0)
        return KERNEL_OK;
    struct step_plan *plan = NULL;
    status = steps_open(device);
    if (status == KERNEL_OK)
        status = plan_find(device, a, &plan);
    if (status == KERNEL_OK && a->rows == 1) {
        status = run_one(device, a, plan);
        if (status != KERNEL_UNSUPPORTED)
            return status;
        status = KERNEL_OK;
    }
    if (status != KERNEL_OK)
        return status;

    struct chain chain = {device, a, lay_out(a, a->workspace), STEP_ROWS, NULL, STEP_PLAIN};
    int bucket = 0;
    for (; chain.rows < a->rows; chain.rows *= 2)
        bucket++;
    status = cuda_check(device, cudaEventSynchronize(device->steps->read));
    if (status != KERNEL_OK)
        return status;
    chain.adapted = chain.rows > STEP_ROWS ? fill_header(a, device->steps->wide_header)
                                           : fill_header(a, device->steps->header);
    if (chain.adapted != STEP_PLAIN) {
        chain.table = plan->table;
        status = send_adapters(device, a, plan);
    }
    if (status == KERNEL_OK)
        status = run_chain(&chain, &plan->graphs[bucket][chain.adapted]);
    if (status == KERNEL_OK)
        status = cuda_check(device, cudaEventRecord(device->steps->read, device->stream));
    return status;
}
