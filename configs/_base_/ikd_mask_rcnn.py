# Mask R-CNN ResNet-50 from Cascade Mask R-CNN ResNeXt-101 32x4d with deformable convolutions, with FGD and IKD, trained on
# boxes and masks. Schedule, attack, sampler and augmentation as in ikd_retinanet.py; learning rate 0.02, levels 0..3 of the
# neck's 5, and the student starts from its own neck and head, as published.
_base_ = "mmdet::mask_rcnn/mask-rcnn_r50_fpn_2x_coco.py"
custom_imports = dict(imports=["ikd_fast.mmdet"])

model = dict(
    _delete_=True,
    type="IKDDistiller",
    student=_base_.model,
    teacher_config="mmdet::dcn/cascade-mask-rcnn_x101-32x4d-dconv-c3-c5_fpn_1x_coco.py",
    teacher_ckpt="https://download.openmmlab.com/mmdetection/v2.0/dcn/cascade_mask_rcnn_x101_32x4d_fpn_dconv_c3-c5_1x_coco/"
    "cascade_mask_rcnn_x101_32x4d_fpn_dconv_c3-c5_1x_coco-e75f90c8.pth",
    losses=[dict(type="FGDLoss", preset="mask_rcnn", source="neck.fpn_convs.{i}.conv")],
    adv=dict(
        beta=2.5e-7,
        attack=dict(type="OnlineDIFGSM", mode="carry", memory=dict(bits=4, stride=2, resolution="original")),
        loss=dict(type="AdvFeatureLoss", levels=(0, 1, 2, 3)),
    ),
    augment=dict(type="AdaptiveFreqAug", crop_align=8),
    init_student=False,
    stop_at=dict(epoch=16),
)
train_dataloader = dict(sampler=dict(_delete_=True, type="KeyedSampler", slots=16))
optim_wrapper = dict(optimizer=dict(lr=0.02), clip_grad=dict(max_norm=35, norm_type=2))
