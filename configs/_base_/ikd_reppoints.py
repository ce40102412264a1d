# RepPoints ResNet-50 (GN in neck and head) from RepPoints ResNeXt-101 32x4d with deformable convolutions, with FGD and IKD.
# Schedule, attack, sampler and augmentation as in ikd_retinanet.py. FGD reads the FPN convolutions before their GN, the
# adversarial branch the neck's output after it, as published.
_base_ = "mmdet::reppoints/reppoints-moment_r50_fpn-gn_head-gn_2x_coco.py"
custom_imports = dict(imports=["ikd_fast.mmdet"])

model = dict(
    _delete_=True,
    type="IKDDistiller",
    student=_base_.model,
    teacher_config="mmdet::reppoints/reppoints-moment_x101-dconv-c3-c5_fpn-gn_head-gn_2x_coco.py",
    teacher_ckpt="https://download.openmmlab.com/mmdetection/v2.0/reppoints/"
    "reppoints_moment_x101_fpn_dconv_c3-c5_gn-neck%2Bhead_2x_coco/"
    "reppoints_moment_x101_fpn_dconv_c3-c5_gn-neck%2Bhead_2x_coco_20200329-f87da1ea.pth",
    losses=[dict(type="FGDLoss", preset="reppoints", source="neck.fpn_convs.{i}.conv")],
    adv=dict(
        beta=1e-5,
        attack=dict(type="OnlineDIFGSM", mode="carry", memory=dict(bits=4, stride=2, resolution="original")),
    ),
    augment=dict(type="AdaptiveFreqAug", crop_align=8),
    init_student=True,
    stop_at=dict(epoch=16),
)
train_dataloader = dict(sampler=dict(_delete_=True, type="KeyedSampler", slots=16))
optim_wrapper = dict(optimizer=dict(lr=0.01), clip_grad=dict(max_norm=35, norm_type=2))
