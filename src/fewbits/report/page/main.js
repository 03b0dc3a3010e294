// The page: each section starts itself.

import { start as startTheme } from "../page_base/theme.js";
import { start as startBlocks } from "./blocks_view.js";
import { start as startGradients } from "./gradients_view.js";
import { start as startLine } from "./line_view.js";
import { start as startMemory } from "./memory_view.js";
import { start as startNumber } from "./number_view.js";
import { start as startRange } from "./range_view.js";
import { start as startTraining } from "./training_view.js";

for (const start of [
  startTheme,
  startNumber,
  startRange,
  startLine,
  startBlocks,
  startTraining,
  startGradients,
  startMemory,
])
  start();
