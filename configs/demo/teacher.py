# The demo's teacher: 70 epochs of 10 steps, about 5 minutes on 2 cores.
_base_ = ['../_base_/demo_retinanet.py', '../_base_/demo_data.py', '../_base_/demo_schedule.py']

max_epochs = 70
train_cfg = dict(max_epochs=max_epochs, val_interval=max_epochs)
param_scheduler = [
    dict(type='OneCycleLR', eta_max=2e-3, pct_start=0.2, by_epoch=True, convert_to_iter_based=True,
         total_steps=max_epochs),
]
