# The demo's teacher: 700 steps, about 5 minutes on 2 cores. Trained again by `ikd-fast demo --train-teacher`.
_base_ = ["../_base_/demo_retinanet.py", "../_base_/demo_data.py", "../_base_/demo_schedule.py"]

teacher_steps = 700
max_epochs = 70
train_cfg = dict(max_epochs=max_epochs, val_interval=max_epochs)
warmup_epochs = 14
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
