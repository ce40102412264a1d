# FGD and IKD from adversarial images that were made beforehand:
#   ikd-fast attack ikd_fast::demo/teacher.py ikd_fast::demo_teacher.safetensors --out runs/demo/adversarial --mode single --resize none
_base_ = "./fgd_ikd.py"
train_pipeline = [
    *_base_.train_pipeline[:2],
    dict(type="LoadAdversarialImage", directory="runs/demo/adversarial"),
    *_base_.train_pipeline[2:],
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
model = dict(adv=dict(attack=dict(_delete_=True, type="OfflineImages")))
