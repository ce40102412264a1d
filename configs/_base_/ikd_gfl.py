# GFL ResNet-50 from GFL ResNet-101 with IKD: 12 epochs, learning rate 0.01 divided by 10 after epochs 8 and 11, the method in the
# first 8 (two thirds, as the paper's 16 of 24). Attack, sampler, augmentation and beta as in ikd_retinanet.py, since IKD has no
# run of GFL. The student starts from its own neck and head.
_base_ = "mmdet::gfl/gfl_r50_fpn_1x_coco.py"
custom_imports = dict(imports=["ikd_fast.mmdet"])

model = dict(
    _delete_=True,
    type="IKDDistiller",
    student=_base_.model,
    teacher_config="mmdet::gfl/gfl_r101_fpn_ms-2x_coco.py",
    teacher_ckpt="https://download.openmmlab.com/mmdetection/v2.0/gfl/gfl_r101_fpn_mstrain_2x_coco/"
    "gfl_r101_fpn_mstrain_2x_coco_20200629_200126-dd12f847.pth",
    adv=dict(
        beta=1e-5,
        attack=dict(type="OnlineDIFGSM", mode="carry", memory=dict(bits=4, stride=2, resolution="original")),
    ),
    augment=dict(type="AdaptiveFreqAug", crop_align=8),
    stop_at=dict(epoch=8),
)
train_dataloader = dict(sampler=dict(_delete_=True, type="KeyedSampler", slots=16))
optim_wrapper = dict(optimizer=dict(lr=0.01), clip_grad=dict(max_norm=35, norm_type=2))
