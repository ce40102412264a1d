# 40 epochs of 10 steps: AdamW. A checkpoint after each epoch; the last two are kept, so that one is
# whole when the run is killed while it writes.
default_scope = "mmdet"
custom_imports = dict(imports=["ikd_fast.mmdet"])

max_epochs = 40
train_cfg = dict(type="EpochBasedTrainLoop", max_epochs=max_epochs, val_interval=max_epochs)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")
optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=2e-3, weight_decay=1e-2),
    clip_grad=dict(max_norm=10.0),
)
# In epochs, stepped every iteration: a linear warm-up, then a cosine to zero.
warmup_epochs = 8
param_scheduler = [
    dict(type="LinearLR", start_factor=0.04, end=warmup_epochs, by_epoch=True, convert_to_iter_based=True),
    dict(
        type="CosineAnnealingLR",
        begin=warmup_epochs,
        end=max_epochs,
        eta_min=0,
        by_epoch=True,
        convert_to_iter_based=True,
    ),
]
default_hooks = dict(
    timer=dict(type="IterTimerHook"),
    logger=dict(type="LoggerHook", interval=10),
    param_scheduler=dict(type="ParamSchedulerHook"),
    checkpoint=dict(type="CheckpointHook", interval=1, max_keep_ckpts=2),
    sampler_seed=dict(type="DistSamplerSeedHook"),
)
env_cfg = dict(mp_cfg=dict(mp_start_method="fork", opencv_num_threads=0))
log_processor = dict(type="LogProcessor", window_size=10, by_epoch=True)
randomness = dict(seed=0)
log_level = "INFO"
load_from = None
resume = False
