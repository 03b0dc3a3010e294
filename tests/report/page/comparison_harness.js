// Runs the parts of the comparison page that need no document: a job as JSON comes in, what is made of it goes out.

import { readFileSync } from "node:fs";
import { decades, doublings, powerOfTen } from "../../../src/fewbits/report/comparison_page/axis.js";
import { bytes, perplexity, significant, withError } from "../../../src/fewbits/report/comparison_page/figures.js";
import { front, placeLabel } from "../../../src/fewbits/report/comparison_page/front.js";
import { arrange } from "../../../src/fewbits/report/comparison_page/modules.js";
import { quoted, visible } from "../../../src/fewbits/report/comparison_page/tokens.js";

const plain = (stack) => ({ ...stack, kinds: stack.kinds.map(({ name, cells }) => [name, [...cells]]) });

const OPS = {
  front: (places) => front(places),
  labels: ({ points, width, inside }) => {
    const taken = [];
    return points.map((point) => {
      const { box } = placeLabel(point, width, taken, inside);
      taken.push(box);
      return box;
    });
  },
  arrange: (names) => {
    const { stacks, outside } = arrange(names);
    return { stacks: stacks.map(plain), outside };
  },
  withError: ([value, error, decimals]) => withError(value, error, decimals),
  perplexity: ([value, error]) => perplexity(value, error),
  significant: ([value, digits]) => significant(value, digits),
  bytes,
  visible,
  quoted,
  decades: (values) => decades(values).map(powerOfTen),
  doublings: ([low, high]) => doublings(low, high),
};

const jobs = JSON.parse(readFileSync(0, "utf8"));
process.stdout.write(JSON.stringify(jobs.map(([op, input]) => OPS[op](input))));
